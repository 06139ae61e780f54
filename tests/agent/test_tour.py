"""The tour's stage of agents, whole."""

from rich.console import Console

from agent.tour import stage
from jaxinfra.tour.report import Report
from jaxinfra.tour.shell import Tour


def test_the_stage_kills_resumes_votes_and_holds():
    report = Report("t", {})
    stage(Tour(Console(quiet=True), report, True))
    (section,) = report.sections
    told = "".join(section.parts)
    assert "The sum is 2397." in told and "written down: 2397" in told
    assert "408" in told and "<svg" in told and "<script" not in told
    assert '<td>asks a person</td><td class="number">0</td><td class="number">50</td>' in told
    assert '<td>off</td><td class="number">50</td><td class="number">0</td>' in told
