"""Bubble, stash and traffic of a schedule, from its table alone.

Two clocks. `free`: each stage does its tasks in order and waits only for what it needs, as separate
processes would; this gives the published bubbles. `lockstep`: one program on all stages, where a
stage begins a tick when it and its neighbours have ended the one before (their messages meet).

Published bubbles, idle over all time, with F = 1 and B = 2 (or B = W = 1 where split), M >= P:

    gpipe, 1f1b    (P-1) / (M+P-1)
    interleaved    (P-1) / (C M+P-1)
    zb-h1          (P-1) / (3 M+P-1)
"""

from __future__ import annotations

import dataclasses

from parallel.pipeline.schedule import B, F, Kind, Schedule, W


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What a schedule costs; times in the unit of the costs given."""

    work: float  # of one stage
    free: float  # time of all, stages waiting for data only
    lockstep: float  # time of all, neighbours tick by tick
    stash: tuple[int, ...]  # the most inputs that each stage keeps, a chunk's input each
    messages: int  # that carry something, one microbatch's activations each
    permutes: int  # that the program sends, two a tick and stage

    @property
    def bubble(self) -> float:
        """Idle share of time where stages wait for data only."""
        return 1 - self.work / self.free

    @property
    def lockstep_bubble(self) -> float:
        """Idle share of time in one program."""
        return 1 - self.work / self.lockstep


def simulate(
    schedule: Schedule, *, forward: float = 1.0, backward: float = 2.0, weights: float = 1.0
) -> Simulation:
    """Runs the table on both clocks.

    Args:
      forward, backward, weights: time of a stage's whole forward and backward pass of a microbatch,
        and the part of `backward` that weight gradients take where the schedule splits it.
    """
    P, C, M = schedule.stages, schedule.chunks, schedule.microbatches
    times = {F: forward / C, B: backward / C, W: weights / C}
    if schedule.splits:
        times[B] -= times[W]
    free = [0.0] * P
    lockstep = [0.0] * P
    done: dict[tuple[Kind, int, int], float] = {}
    for row in schedule.table:
        for s, cell in enumerate(row):
            for task in cell:
                v = task.chunk * P + s
                start = free[s]
                if task.kind == F and v:
                    start = max(start, done[F, task.microbatch, v - 1])
                elif task.kind == B and v + 1 < C * P:
                    start = max(start, done[B, task.microbatch, v + 1])
                free[s] = done[task.kind, task.microbatch, v] = start + times[task.kind]
        ended = [lockstep[s] + sum(times[t.kind] for t in cell) for s, cell in enumerate(row)]
        lockstep = [max(ended[max(s - 1, 0) : s + 2]) for s in range(P)]
        if C > 1:  # the first and the last are neighbours too
            lockstep[0] = lockstep[-1] = max(ended[0], ended[-1], lockstep[0], lockstep[-1])
    return Simulation(
        work=M * (forward + backward),
        free=max(free),
        lockstep=max(lockstep),
        stash=tuple(_stash(schedule, s) for s in range(P)),
        messages=2 * M * (C * P - 1),
        permutes=2 * P * len(schedule.table),
    )


def _stash(schedule: Schedule, stage: int) -> int:
    """Inputs kept at once: from a forward to the last gradient that needs its input."""
    release = W if schedule.splits else B
    kept = most = 0
    for row in schedule.table:
        kept += sum(task.kind == F for task in row[stage])
        most = max(most, kept)
        kept -= sum(task.kind == release for task in row[stage])
    return most
