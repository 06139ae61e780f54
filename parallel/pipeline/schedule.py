"""Pipeline schedules as data: a table of ticks and stages, each cell the tasks of that stage then.

P stages, M microbatches; with chunks C > 1 a stage holds C pieces of the model, and virtual stage
v = c P + s is chunk c of stage s. A result of one tick is at the neighbour in the next.

    name          order of a stage                                 source
    gpipe         all forwards, all backwards                      Huang 2019, arXiv 1811.06965
    1f1b          as many forwards as stages follow, then in turn  Narayanan 2021, arXiv 2104.04473
    eager-1f1b    a forward and a backward in one tick             the same, more forwards ahead
    interleaved   eager-1f1b over C chunks a stage                 arXiv 2104.04473, section 2.2
    zb-h1         weight gradients fill what would be idle         Qi 2023, arXiv 2401.10241

All stages of one program keep step with their neighbours, tick by tick. A tick with one task lasts
as long as the longest of them, so 1f1b, which has forwards beside the longer backwards in every
tick, loses to eager-1f1b there and keeps half the inputs (`simulate` gives both numbers).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence

from jaxinfra.errors import UserError


class Kind(enum.StrEnum):
    """What a task computes."""

    FORWARD = "F"
    BACKWARD = (
        "B"  # the gradient of the input; of the weights too where the schedule does not split
    )
    WEIGHTS = "W"  # the gradient of the weights alone


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work of one stage."""

    kind: Kind
    microbatch: int
    chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who does what when."""

    name: str
    stages: int  # P
    microbatches: int  # M
    chunks: int  # C
    splits: bool  # whether weight gradients are tasks of their own
    table: tuple[tuple[tuple[Task, ...], ...], ...]  # [ticks][stages]

    def __str__(self) -> str:
        chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
        return f"{self.name}, {self.stages} stages, {self.microbatches} microbatches{chunks}"


F, B, W = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHTS
NAMES = ("gpipe", "1f1b", "eager-1f1b", "interleaved", "zb-h1")


def make(name: str, stages: int, microbatches: int, chunks: int = 2) -> Schedule:
    """The schedule of NAMES for P stages and M microbatches; `chunks` counts for interleaved."""
    P, M = stages, microbatches
    if P < 1 or M < 1 or chunks < 1:
        raise UserError(f"schedule: {P} stages, {M} microbatches, {chunks} chunks: give 1 or more")
    if name == "gpipe":
        order = [*(Task(F, m) for m in range(M)), *(Task(B, m) for m in range(M))]
        return laid_out(name, M, [order] * P)
    if name == "1f1b":
        return laid_out(name, M, [_one_forward_one_backward(P - s, M) for s in range(P)])
    if name == "eager-1f1b":
        return _fused(name, P, M, 1)
    if name == "interleaved":
        if M % P:
            raise UserError(f"schedule: {M} microbatches are no multiple of {P} stages; give more")
        return _fused(name, P, M, chunks)
    if name == "zb-h1":
        return laid_out(name, M, [_zero_bubble(P, M, s) for s in range(P)])
    raise UserError(f"schedule: no {name!r}; there are {', '.join(NAMES)}")


def laid_out(name: str, microbatches: int, orders: Sequence[Iterable[Task]]) -> Schedule:
    """The table in which each stage does its tasks in order, one a tick, each as early as it can.

    Raises UserError where stages wait for each other for ever.
    """
    left = [list(order) for order in orders]
    splits = any(task.kind == W for order in left for task in order)
    done: dict[tuple[Kind, int, int], int] = {}
    table: list[tuple[tuple[Task, ...], ...]] = []
    while any(left):
        tick = len(table)
        row = []
        for s, order in enumerate(left):
            ready = bool(order) and all(
                done.get(need, tick) < tick for need in _needs(order[0], s, len(left))
            )
            row.append((order.pop(0),) if ready else ())
        if not any(row):
            s = next(s for s, order in enumerate(left) if order)
            need = next(n for n in _needs(left[s][0], s, len(left)) if n not in done)
            raise UserError(
                f"schedule: {name} deadlocks at tick {tick}: stage {s} waits for {need[0]} of "
                f"microbatch {need[1]} on stage {need[2]}; change the order"
            )
        done |= {(t.kind, t.microbatch, s): tick for s, cell in enumerate(row) for t in cell}
        table.append(tuple(row))
    return Schedule(name, len(left), microbatches, 1, splits, tuple(table))


def _needs(task: Task, stage: int, stages: int) -> list[tuple[Kind, int, int]]:
    """What must be done before a task, without chunks, as (kind, microbatch, stage)."""
    if task.kind == F:
        return [(F, task.microbatch, stage - 1)] if stage else []
    if task.kind == W:
        return [(B, task.microbatch, stage)]
    after = [(B, task.microbatch, stage + 1)] if stage + 1 < stages else []
    return [(F, task.microbatch, stage), *after]


def _one_forward_one_backward(ahead: int, M: int) -> list[Task]:
    """A stage's order: `ahead` forwards more than backwards at most."""
    order: list[Task] = [Task(F, m) for m in range(min(ahead, M))]
    for m in range(M):
        order.append(Task(B, m))
        if m + ahead < M:
            order.append(Task(F, m + ahead))
    return order


def _zero_bubble(P: int, M: int, stage: int) -> list[Task]:
    """H1: the order of 1f1b, with the weight gradient of s backwards ago after each backward.

    Stage s has s weight gradients over for the end, where it would otherwise wait; every stage
    keeps P inputs, as the first does under 1f1b.
    """
    order: list[Task] = []
    for task in _one_forward_one_backward(P - stage, M):
        order.append(task)
        if task.kind == B and task.microbatch >= stage:
            order.append(Task(W, task.microbatch - stage))
    return order + [Task(W, m) for m in range(max(M - stage, 0), M)]


def _fused(name: str, P: int, M: int, C: int) -> Schedule:
    """A forward and a backward in every tick: the k-th of stage s at ticks k + s and C P - 1 + ....

    Both go through the chunks in groups of P microbatches, so a microbatch that leaves the last
    stage enters the first again in the next tick.
    """
    order = [
        (g * P + i, c) for g in range(-(-M // P)) for c in range(C) for i in range(P)
        if g * P + i < M
    ]  # fmt: skip
    table: list[list[list[Task]]] = [
        [[] for _ in range(P)] for _ in range(M * C + P - 1 + C * P - 1)
    ]
    for s in range(P):
        for k, (m, c) in enumerate(order):
            table[s + k][s].append(Task(F, m, c))
            table[C * P - 1 + P - 1 - s + k][s].append(Task(B, m, C - 1 - c))
    return Schedule(
        name, P, M, C, False, tuple(tuple(tuple(cell) for cell in row) for row in table)
    )
