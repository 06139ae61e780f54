"""The tour goes on whatever a stage does, and its report is whole and needs no other file."""

import html.parser
import re
import types

import pytest
from matplotlib.figure import Figure

from jaxinfra.errors import UserError
from jaxinfra.tour import shell


class Stage:
    """An entry point."""

    def __init__(self, name, stage):
        self.name, self.load = name, lambda: stage


def good(tour):
    section = tour.report.section("Good")
    section.text("a < b & c")
    section.table("Rates", ("what", "rate"), [("x", 1234.5), ("y", 7), ("z", "<fast>")])
    figure = Figure()
    figure.add_subplot().plot([1, 2], [3, 4])
    section.figure("A line", figure)
    tour.left["from good"] = 5


def offline(tour):
    raise UserError("no network; try later")


def broken(tour):
    raise ZeroDivisionError("a bug")


def last(tour):
    tour.report.section("Last").text(f"was left {tour.left['from good']}")


def register(monkeypatch, stages):
    """Only in the shell's eyes: jax looks for its plugins in the same place."""
    metadata = types.SimpleNamespace(entry_points=lambda group: stages)
    monkeypatch.setattr(shell, "importlib", types.SimpleNamespace(metadata=metadata))


def run(monkeypatch, tmp_path, stages, **options):
    register(monkeypatch, stages)
    status = shell.run(tmp_path / "report.html", **options)
    return status, (tmp_path / "report.html").read_text()


class Page(html.parser.HTMLParser):
    """Whether every tag is closed, and which files the page asks for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asked = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.asked += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_stages_run_in_the_order_of_their_names(monkeypatch, tmp_path):
    status, page = run(monkeypatch, tmp_path, [Stage("20-last", last), Stage("10-good", good)])
    assert status == 0
    assert page.index("<h2>Good") < page.index("was left 5") < page.index("Conditions of every")
    assert "a &lt; b &amp; c" in page and "&lt;fast&gt;" in page
    assert '<td class="number">1,234</td>' in page and '<td class="number">7</td>' in page
    parsed = Page(page)
    assert not parsed.open and all(value.startswith("#") for value in parsed.asked)
    assert len(re.findall(r"This stage took \d+ s\.", page)) == 2


def test_a_stage_that_fails_stops_nothing(monkeypatch, tmp_path, capsys):
    stages = [Stage("10-good", good), Stage("15-web", offline), Stage("20-last", last)]
    status, page = run(monkeypatch, tmp_path, stages)
    assert status == 0 and "Left out: no network; try later" in page and "was left 5" in page
    stages[1] = Stage("15-web", broken)
    status, page = run(monkeypatch, tmp_path, stages)
    assert status == 1 and "<h2>web (failed)" in page and "was left 5" in page
    assert "ZeroDivisionError: a bug" in page
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_only_some_stages(monkeypatch, tmp_path):
    stages = [Stage("10-good", good), Stage("15-web", broken)]
    status, page = run(monkeypatch, tmp_path, stages, only=("good",))
    assert status == 0 and "<h2>Good" in page
    with pytest.raises(UserError, match="no stage is named like paint"):
        run(monkeypatch, tmp_path, stages, only=("paint",))


def test_a_report_that_cannot_be_written_is_told_before_the_work(monkeypatch, tmp_path):
    begun = []
    register(monkeypatch, [Stage("10-x", begun.append)])
    with pytest.raises(UserError, match="cannot be written"):
        shell.run(tmp_path)
    assert not begun
