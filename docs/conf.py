"""How Sphinx builds the documentation: `make docs`."""

import re
import tomllib
from pathlib import Path

_project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

project = _project["name"]
version = release = _project["version"]
author = "The jaxinfra authors"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Notebooks are made from the lessons, which are pages themselves.
exclude_patterns = ["_build", "jupyter_execute", "notebooks"]

# tests/docs/test_lessons.py runs every cell; a build runs none and needs no accelerator.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 2

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "code"
suppress_warnings = ["ref.python"]  # annotations say Model, and several layers have one

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"home_page_in_toc": True, "show_navbar_depth": 2}


def _end_code(app, what, name, obj, options, lines: list[str]) -> None:
    """Lets a letter follow code in docstrings, as in `Array`s, which docutils refuses."""
    lines[:] = [re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line) for line in lines]


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _end_code)
