"""Runs the stages that the layers registered and writes the report, whatever happens in a stage."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.measure import environment
from jaxinfra.tour.report import Report

GROUP = "jaxinfra.tour"


@dataclasses.dataclass
class Tour:
    """What a stage is given: where to print, what to write into, what earlier stages left."""

    console: Console
    report: Report
    quick: bool  # a shorter tour, for tests of the tour itself
    left: dict[str, Any] = dataclasses.field(default_factory=dict)  # "trained": (config, params)


def run(out: Path, *, quick: bool = False, only: tuple[str, ...] = ()) -> int:
    """Runs all stages, or those whose names contain a word of `only`; returns the exit status.

    A UserError of a stage is a note in the report (no network, say); any other exception is shown
    with its traceback, and the tour goes on and ends with status 1.
    """
    stages = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda ep: ep.name)
    stages = [ep for ep in stages if not only or any(word in ep.name for word in only)]
    if not stages:
        raise UserError(f"tour: no stage is named like {', '.join(only)}")
    console = Console()
    tour = Tour(console, Report("A tour of jaxinfra on this machine", environment()), quick)
    status, start = 0, time.perf_counter()
    tour.report.write(out)  # now, so that a wrong place is told before the work
    for number, entry_point in enumerate(stages, 1):
        console.rule(f"{number}/{len(stages)}  {entry_point.name.partition('-')[2]}")
        begun, before = time.perf_counter(), len(tour.report.sections)
        try:
            entry_point.load()(tour)
        except UserError as error:
            console.print(f"[yellow]left out:[/] {error}", highlight=False)
            tour.report.section(entry_point.name.partition("-")[2]).note(f"Left out: {error}")
        except Exception:
            status = 1
            traceback.print_exc(file=sys.stderr)
            section = tour.report.section(f"{entry_point.name.partition('-')[2]} (failed)")
            section.verbatim(traceback.format_exc())
        seconds = time.perf_counter() - begun
        if len(tour.report.sections) > before:
            tour.report.sections[-1].text(f"This stage took {seconds:.0f} s.")
    tour.report.write(out)
    minutes = (time.perf_counter() - start) / 60
    console.rule()
    console.print(f"The tour took {minutes:.1f} minutes. Open {out}")
    return status
