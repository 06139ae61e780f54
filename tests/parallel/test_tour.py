"""The tour's stage: real runs in a process of their own, and what it makes of them."""

import subprocess

import pytest
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.tour.report import Report
from jaxinfra.tour.shell import Tour
from parallel import tour


def short_tour():
    return Tour(Console(quiet=True), Report("", {}), quick=True)


@pytest.mark.slow
def test_the_stage_compares_strategies():
    given = short_tour()
    tour.stage(given)
    (section,) = given.report.sections
    page = "".join(section.parts)
    for told in ("ZeRO-2", "1 all-reduce", "bubble in one program", "zb-h1", "<svg"):
        assert told in page


def test_a_run_that_fails_is_told(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="out of devices")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwds: failed)
    with pytest.raises(UserError, match="out of devices"):
        tour.stage(short_tour())
