"""The site: ``make docs``. Its pages are the Markdown files of this folder, README and CHANGELOG, and the docstrings."""

project = "sb3_blpo"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "BLPO for Stable-Baselines3"
myst_heading_anchors = 3
autodoc_default_options = {"show-inheritance": True}
autodoc_typehints = "none"
