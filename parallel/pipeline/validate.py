"""What makes a schedule right: every task once, none before what it needs."""

from __future__ import annotations

from jaxinfra.errors import UserError
from parallel.pipeline.schedule import B, F, Kind, Schedule, Task, W


def validate(schedule: Schedule) -> None:
    """Raises UserError that names the first task that is missing, doubled or too early.

    Within a tick a stage computes F, then B, then W; a result crosses to another stage in the next.
    """
    P, C = schedule.stages, schedule.chunks
    kinds = (F, B, W) if schedule.splits else (F, B)
    ticks: dict[tuple[Kind, int, int], int] = {}  # (kind, microbatch, virtual stage)
    for tick, row in enumerate(schedule.table):
        if len(row) != P:
            raise _wrong(schedule, f"tick {tick} has {len(row)} stages")
        for s, cell in enumerate(row):
            for kind in kinds:
                if sum(task.kind == kind for task in cell) > 1:
                    raise _wrong(schedule, f"stage {s} has two {kind} in tick {tick}")
            for task in cell:
                key = (task.kind, task.microbatch, task.chunk * P + s)
                if key in ticks:
                    raise _wrong(schedule, f"{_told(task, s)} stands twice")
                ticks[key] = tick
    expected = {
        (k, m, v) for k in kinds for m in range(schedule.microbatches) for v in range(C * P)
    }
    for kind, m, v in sorted(expected ^ ticks.keys()):
        there = "is not asked for" if (kind, m, v) in ticks else "is missing"
        raise _wrong(schedule, f"{_told(Task(kind, m, v // P), v % P)} {there}")
    for (kind, m, v), tick in ticks.items():
        for needed, crosses in _before(kind, m, v, C * P):
            if ticks[needed] + crosses > tick:
                raise _wrong(
                    schedule,
                    f"{_told(Task(kind, m, v // P), v % P)} in tick {tick} needs {needed[0]} of "
                    f"virtual stage {needed[2]}, which is done in tick {ticks[needed]}",
                )


def _before(kind: Kind, m: int, v: int, virtual: int) -> list[tuple[tuple[Kind, int, int], bool]]:
    """What a task needs, and whether it comes from another stage."""
    if kind == F:
        return [((F, m, v - 1), True)] if v else []
    if kind == W:
        return [((B, m, v), False)]
    after = [((B, m, v + 1), True)] if v + 1 < virtual else []
    return [((F, m, v), False), *after]


def _told(task: Task, stage: int) -> str:
    return f"{task.kind} of microbatch {task.microbatch}, chunk {task.chunk}, stage {stage}"


def _wrong(schedule: Schedule, what: str) -> UserError:
    return UserError(f"schedule {schedule}: {what}")
