"""The tables of the README and of the documentation say what the ledger says."""

import dataclasses

import pytest

from benchmarks import tables
from jaxinfra.errors import UserError
from jaxinfra.measure import Entry, write

ENTRY = Entry(
    name="walk-far", claim="Walking beats standing", command="walk --far", unit="m/s",
    samples={"ours": [2.0, 2.2, 2.1], "theirs": [1.0, 1.1, 1.0]}, ratio=2.1, interval=(1.9, 2.2),
    roofline=0.07, roof="a sprint", inputs="one road", mislead="downhill",
    environment={"device": "2 x legs", "jax": "0.0", "torch": "1.1"},
)  # fmt: skip
ALONE = dataclasses.replace(
    ENTRY, name="stand", claim="a | b\nc", samples={"ours": [1234.5]}, ratio=None, interval=None,
    roofline=None, roof="none for standing",
)  # fmt: skip
ALL = "before\n<!-- ledger -->\nold\n<!-- /ledger -->\nafter\n"


def test_a_row_says_it_all():
    assert tables.row(ENTRY, True) == (
        "| [Walking beats standing](benchmarks/results/walk-far.json) | 2.1 m/s | theirs: 1 m/s "
        "| 2.10 (1.90–2.20) | 7 % of a sprint | 2 x legs | jax 0.0, torch 1.1 |\n"
    )
    assert tables.row(ALONE, False) == (
        "| a \\| b c | 1,234 m/s | — | — | — | 2 x legs | jax 0.0 |\n"
    )  # fmt: skip


def test_what_stands_between_the_markers_is_replaced():
    shown = tables.render(ALL, [ENTRY, ALONE])
    lines = shown.splitlines()
    assert "old" not in shown and lines[0] == "before" and lines[-1] == "after"
    assert {line.replace("\\|", "").count("|") for line in lines[2:6]} == {8}
    assert tables.render(shown, [ENTRY, ALONE]) == shown
    assert tables.render(ALL, []) == "before\n<!-- ledger -->\n<!-- /ledger -->\nafter\n"
    assert tables.render("no markers", [ENTRY]) == "no markers"


def test_a_name_chooses_entries():
    text = "".join(
        f"<!-- ledger:{name} -->\n<!-- /ledger -->\n" for name in ("walk-*", "stand", "*")
    )
    first, second, third = tables.render(text, [ENTRY, ALONE]).split("<!-- /ledger -->\n")[:3]
    assert "Walking" in first and "b c" not in first
    assert "Walking" not in second and "b c" in second
    assert "Walking" in third and "b c" in third


@pytest.mark.parametrize(
    "text",
    [
        "<!-- ledger:run -->\n<!-- /ledger -->\n",  # no such entry
        "<!-- ledger -->\nno end\n",
        "<!-- ledger -->\n<!-- ledger -->\n<!-- /ledger -->\n",
        "<!-- ledger walk-far -->\n<!-- /ledger -->\n",
    ],
)
def test_a_marker_that_means_nothing_is_an_error(text):
    with pytest.raises(UserError, match="ledger"):
        tables.render(text, [ENTRY])


@pytest.fixture
def root(tmp_path):
    """A repository with one entry and three pages, one of them built."""
    write(ENTRY, tmp_path / "benchmarks" / "results")
    for name in ("README.md", "docs/lessons/walk.md", "docs/_build/walk.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(ALL)
    return tmp_path


def test_check_finds_what_write_mends(root, capsys):
    assert tables.main(["--check"], root) == 1
    assert (root / "README.md").read_text() == ALL
    assert "README.md: differs" in capsys.readouterr().out
    assert tables.main([], root) == 0
    assert tables.main(["--check"], root) == 0
    assert "](benchmarks/results/walk-far.json)" in (root / "README.md").read_text()
    assert "| Walking beats standing |" in (root / "docs/lessons/walk.md").read_text()
    assert (root / "docs/_build/walk.md").read_text() == ALL
    write(dataclasses.replace(ENTRY, samples={**ENTRY.samples, "ours": [3.0]}),
          root / "benchmarks" / "results")  # fmt: skip
    assert tables.main(["--check"], root) == 1


def test_errors_are_one_line(root, capsys):
    (root / "docs" / "odd.md").write_text("<!-- ledger:run -->\n<!-- /ledger -->\n")
    assert tables.main([], root) == 1
    assert "docs/odd.md" in capsys.readouterr().err
    (root / "benchmarks/results/walk-far.json").write_text("{}")
    assert tables.main(["--check"], root) == 1
    assert "walk-far.json" in capsys.readouterr().err


def test_an_empty_repository(tmp_path):
    (tmp_path / "README.md").write_text("nothing\n")
    assert tables.main(["--check"], tmp_path) == tables.main([], tmp_path) == 0


def test_the_committed_tables_are_true():
    assert tables.main(["--check"]) == 0
