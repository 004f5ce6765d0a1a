"""For all tests: one thread, how many examples hypothesis tries, and where SB3 makes the folders of its loggers."""

from collections.abc import Iterator

import pytest
import torch as th
from hypothesis import settings

# Few and always the same ones, or many (``--hypothesis-profile=fuzz``)
settings.register_profile("ci", max_examples=30, derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=500, deadline=None, print_blob=True)
settings.load_profile("ci")
# Small networks gain nothing from more, and results do not depend on the machine
th.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder that pytest removes, instead of one in /tmp for each model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("logs")))
        yield
