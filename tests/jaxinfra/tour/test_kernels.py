"""The tour's stage of kernels says what it saw, and does not pass where a race goes unseen."""

import io

import pytest
from rich.console import Console

from jaxinfra.tour import kernels
from jaxinfra.tour.report import Report
from jaxinfra.tour.shell import Tour
from pallas_kernels.matmul.ladder import broken


def quick():
    return Tour(Console(file=io.StringIO(), width=100), Report("A tour", {}), quick=True)


def test_the_stage_tells_every_step_and_every_mistake():
    tour = quick()
    kernels.stage(tour)
    shown, (section,) = tour.console.file.getvalue(), tour.report.sections  # pyright: ignore
    for step in kernels.STEPS[:2]:
        assert f"{step} " in shown and f"<td>{step}</td>" in section.parts[1]
    found = [m for m in broken.MISTAKES if kernels._findable(m)]
    assert len(found) >= 2
    assert shown.count(": caught") == section.parts[2].count("<td>caught</td>") == len(found)


def test_a_detector_that_sees_nothing_fails_the_stage(monkeypatch):
    monkeypatch.setattr(kernels, "_climb", lambda name: (name, 0.0, 0.0, 0.0))
    monkeypatch.setattr(kernels, "interpret", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="missed a planted mistake"):
        kernels.stage(quick())
