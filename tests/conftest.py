"""How many examples hypothesis tries: few and always the same ones, or many (``--hypothesis-profile=fuzz``)."""

from hypothesis import settings

settings.register_profile("ci", max_examples=30, derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=500, deadline=None, print_blob=True)
settings.load_profile("ci")
