"""Writes docs/notebooks/*.ipynb, the lessons as notebooks with a first cell that installs.

python docs/make_notebooks.py            # needs the extra "docs"
"""

from __future__ import annotations

import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent

_BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repo}/blob/{tag}/docs/notebooks/{stem}.ipynb"
    "?flush_caches=true)"
)

_INSTALL = """\
# Installs jaxinfra where it is missing, as in a fresh Colab session.
import glob
import importlib.util
import shutil
import subprocess
import sys

REPOSITORY = "{repository}"  # where jaxinfra is cloned from
TAG = "{tag}"

if importlib.util.find_spec("jaxinfra") is None:
    if "jax" in sys.modules:
        raise RuntimeError(
            "jax is already imported, and this session would keep that version after installing "
            "another: choose Runtime > Restart session, then run this cell first"
        )
    if not REPOSITORY:
        raise RuntimeError("set REPOSITORY to the address that jaxinfra is cloned from")
    extra = "[cuda]" if shutil.which("nvidia-smi") else ""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        extra = "[tpu]"
    wanted = f"jaxinfra{{extra}} @ git+{{REPOSITORY}}@{{TAG}}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wanted], check=True)"""

_CHECK = """\
import jax

print("jax", jax.__version__, "on", jax.devices())"""


def project() -> tuple[str | None, str]:
    """The repository's address, where pyproject.toml names one, and the version."""
    table = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    urls = {name.lower(): url for name, url in table.get("urls", {}).items()}
    return urls.get("repository"), table["version"]


def head(stem: str, repository: str | None, version: str) -> list[tuple[str, str]]:
    """The cells before the lesson's own: a badge where there is an address, install, check."""
    tag = f"v{version}"
    install = ("code", _INSTALL.format(repository=repository or "", tag=tag))
    cells = [install, ("code", _CHECK)]
    if repository is None:
        return cells
    repo = repository.removeprefix("https://github.com/").removesuffix(".git").strip("/")
    return [("markdown", _BADGE.format(repo=repo, tag=tag, stem=stem)), *cells]


def main() -> None:
    """Writes every notebook."""
    import jupytext
    import nbformat

    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    for lesson in sorted((DOCS / "lessons").glob("*.md")):
        notebook = jupytext.read(lesson, fmt="md:myst")
        first = [new[kind](source) for kind, source in head(lesson.stem, *project())]
        notebook.cells = [*first, *notebook.cells]
        for i, cell in enumerate(notebook.cells):
            cell["id"] = f"{lesson.stem}-{i}"
        notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
        path = DOCS / "notebooks" / f"{lesson.stem}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(nbformat.writes(notebook, version=4) + "\n")
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
