"""Every lesson runs from top to bottom, says what it needs, and links to what is there."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.hardware.lessons import NEEDS, front_matter

DOCS = Path(__file__).parents[2] / "docs"
LESSONS = sorted((DOCS / "lessons").glob("*.md"))
PAGES = [*sorted(DOCS.glob("*.md")), *LESSONS]
_FENCE = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_RUN = """
import json, sys
space = {"__name__": "__main__"}
for cell in json.load(sys.stdin):
    exec(compile(cell, "<cell>", "exec"), space)
"""

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells(text: str) -> list[tuple[str, str]]:
    """("markdown" or "code", source) of a page without its front matter, empty cells left out."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    kinds = ("markdown", "code")
    parts = enumerate(_FENCE.split(body))
    return [(kinds[i % 2], part.strip()) for i, part in parts if part.strip()]


def run(sources: list[str]) -> subprocess.CompletedProcess:
    """Runs cells one after the other in one namespace of a fresh Python on the CPU."""
    return subprocess.run(
        [sys.executable, "-c", _RUN], input=json.dumps(sources), capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=600,
    )  # fmt: skip


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links of the page at `path` that lead nowhere."""
    links = [link for link in _LINK.findall(text) if not re.match(r"[a-z]+:|#", link)]
    return [link for link in links if not (path.parent / link.partition("#")[0]).exists()]


def claims_without_a_run(text: str) -> list[str]:
    """Parts of the pattern that a lesson lacks or has in another order."""
    wanted = ["Claim", "Predict", "Run", "What would change the conclusion"]
    found = re.findall(r"^## ([^\n]+)$", text, re.MULTILINE)
    places = [next((i for i, h in enumerate(found) if h.startswith(w)), -1) for w in wanted]
    if places == sorted(places) and -1 not in places:
        return []
    return [w for w, place in zip(wanted, places, strict=True) if place < 0] or wanted


@pytest.mark.slow
@each_lesson
def test_every_cell_runs_and_something_is_printed(path):
    sources = [source for kind, source in cells(path.read_text()) if kind == "code"]
    done = run(sources)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_a_cell_that_fails_is_noticed():
    assert run(["x = 1", "print(x)"]).stdout == "1\n"
    assert run(["x = 1", "assert x == 2"]).returncode != 0


@each_lesson
def test_front_matter_says_what_the_lesson_needs(path):
    text = path.read_text()
    assert re.search(r"^needs: \[.+\]$", text.split("\n---\n")[0], re.MULTILINE)
    assert set(front_matter(text)[0]) <= set(NEEDS)


@each_lesson
def test_lessons_claim_predict_run_and_doubt(path):
    text = path.read_text()
    assert claims_without_a_run(text) == []
    assert claims_without_a_run(text.replace("## Predict", "## Then")) == ["Predict"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_relative_links_lead_somewhere(path):
    assert broken_links(path, path.read_text()) == []


def test_a_broken_link_is_noticed():
    text = "[a](../lessons/nowhere.md) [b](https://example.org) [c](#here) [d](../conf.py)"
    assert broken_links(LESSONS[0], text) == ["../lessons/nowhere.md"]


def test_every_lesson_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    assert [path.stem for path in LESSONS if f"lessons/{path.stem}\n" not in index] == []


@each_lesson
def test_the_notebook_is_the_lesson_with_a_cell_that_installs(path):
    notebook = json.loads((DOCS / "notebooks" / f"{path.stem}.ipynb").read_text())
    found = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    make = runpy.run_path(str(DOCS / "make_notebooks.py"))
    head = make["head"](path.stem, *make["project"]())
    assert found == [*head, *cells(path.read_text())], "run `python docs/make_notebooks.py`"
    assert not any(cell.get("outputs") for cell in notebook["cells"])


def test_no_notebook_is_left_of_a_lesson_that_is_gone():
    stems = {path.stem for path in (DOCS / "notebooks").glob("*.ipynb")}
    assert stems == {path.stem for path in LESSONS}


def test_a_badge_needs_an_address():
    make = runpy.run_path(str(DOCS / "make_notebooks.py"))
    address = "https://github.com/someone/jaxinfra"
    assert [kind for kind, _ in make["head"]("roofline", None, "0.1.0")] == ["code"] * 2
    (_, badge), (_, install), _ = make["head"]("roofline", address, "0.1.0")
    assert "someone/jaxinfra/blob/v0.1.0/docs/notebooks/roofline.ipynb" in badge
    assert f'REPOSITORY = "{address}"' in install and 'TAG = "v0.1.0"' in install


def test_the_first_cell_refuses_a_jax_that_was_imported_first():
    """Where jaxinfra is missing; where it is there, nothing is installed and it runs."""
    make = runpy.run_path(str(DOCS / "make_notebooks.py"))
    (_, cell), (_, check) = make["head"]("roofline", None, "0.1.0")
    hide = "import importlib.util as u; real = u.find_spec\n"
    hide += "u.find_spec = lambda name, *a: None if name == 'jaxinfra' else real(name, *a)"
    refused = run([hide, "import jax", cell])
    assert refused.returncode != 0 and "restart" in refused.stderr.lower()
    unknown = run([hide, cell])
    assert unknown.returncode != 0 and "REPOSITORY" in unknown.stderr
    here = run([cell, check])
    assert here.returncode == 0 and "jax" in here.stdout
