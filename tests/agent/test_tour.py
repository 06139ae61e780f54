"""The tour's stage of agents, whole, on random weights: its grammars hold whatever the weights."""

import pytest
from rich.console import Console

from agent import tour as module
from jaxinfra.errors import UserError
from jaxinfra.tour.report import Report
from jaxinfra.tour.shell import Tour
from tests.agent.random_model import write


@pytest.mark.slow
def test_the_stage_kills_resumes_votes_and_holds(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(module, "MODEL", str(tmp_path))
    report = Report("t", {})
    module.stage(Tour(Console(quiet=True), report, True))
    (section,) = report.sections
    told = "".join(section.parts)
    assert "calculator {" in told and "python {" in told and "final_result {" in told
    assert '<td>starts of tools</td><td class="number">2</td><td class="number">4</td>' in told
    assert '<td class="number">0</td><td class="number">1</td>' in told, "written down once"
    assert "and 0 computed again" in told and "voted {" in told
    assert "<svg" in told and "<script" not in told
    assert '<td>asks a person</td><td class="number">0</td><td class="number">50</td>' in told
    assert '<td>off</td><td class="number">50</td><td class="number">0</td>' in told


def test_a_model_that_cannot_be_had_is_told(monkeypatch):
    monkeypatch.setattr(module, "MODEL", "/no/such/model")
    with pytest.raises(UserError, match="no such"):
        module.stage(Tour(Console(quiet=True), Report("t", {}), True))
