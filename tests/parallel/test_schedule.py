"""Schedules as tables: right by the validator, with the published bubbles; wrong ones rejected."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfra.errors import UserError
from parallel.pipeline import draw
from parallel.pipeline.schedule import NAMES, B, F, Schedule, Task, W, laid_out, make
from parallel.pipeline.simulate import simulate
from parallel.pipeline.validate import validate


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES), P=st.integers(1, 6), rounds=st.integers(1, 3),
    chunks=st.integers(1, 3),
)  # fmt: skip
def test_schedules_of_every_size_are_right(name, P, rounds, chunks):
    validate(make(name, P, P * rounds, chunks))


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(set(NAMES) - {"interleaved"})), P=st.integers(1, 5),
       M=st.integers(1, 9))  # fmt: skip
def test_any_number_of_microbatches(name, P, M):
    validate(make(name, P, M))


@pytest.mark.parametrize("P", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_published_bubbles(P, rounds):
    M = P * rounds
    for name in ("gpipe", "1f1b", "eager-1f1b"):
        assert simulate(make(name, P, M)).bubble == pytest.approx((P - 1) / (M + P - 1))
    for C in (2, 3):
        simulation = simulate(make("interleaved", P, M, C))
        assert simulation.bubble == pytest.approx((P - 1) / (C * M + P - 1))
    assert simulate(make("zb-h1", P, M)).bubble == pytest.approx((P - 1) / (3 * M + P - 1))


@pytest.mark.parametrize("P", [2, 4, 8])
def test_what_lockstep_costs(P):
    """One task a tick costs 1f1b a third more in the end; two a tick, or equal tasks, nothing."""
    M = 8 * P
    assert simulate(make("gpipe", P, M)).lockstep == 3 * (M + P - 1)
    assert simulate(make("eager-1f1b", P, M)).lockstep == 3 * (M + P - 1)
    assert simulate(make("interleaved", P, M)).lockstep == 3 * (M + (P - 1) / 2)
    assert simulate(make("zb-h1", P, M)).lockstep == 3 * M + P - 1
    assert simulate(make("1f1b", P, M)).lockstep > 3.7 * M


def test_stashes():
    P, M = 4, 12
    assert simulate(make("gpipe", P, M)).stash == (M,) * P
    assert simulate(make("1f1b", P, M)).stash == (4, 3, 2, 1)
    assert simulate(make("eager-1f1b", P, M)).stash == (7, 5, 3, 1)
    assert max(simulate(make("zb-h1", P, M)).stash) == P
    assert max(simulate(make("1f1b", P, 2)).stash) == 2


WRONG = {
    "missing": (lambda t: t[:-1], "missing"),
    "twice": (lambda t: (*t, t[-1]), "stands twice"),
    "backward before forward": (lambda t: tuple(reversed(t)), "which is done in tick"),
    "another microbatch": (
        lambda t: (((Task(F, 9), *t[0][0][1:]), *t[0][1:]), *t[1:]), "is missing|is not asked for",
    ),
    "a stage too few": (lambda t: (t[0][:-1], *t[1:]), "has 1 stages"),
    "two forwards in a tick": (lambda t: ((t[0][0] + t[1][0], ()), ((), t[1][1]), *t[2:]), "two F"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_tables_are_told(case):
    right = make("1f1b", 2, 3)
    change, told = WRONG[case]
    with pytest.raises(UserError, match=told):
        validate(dataclasses.replace(right, table=change(right.table)))


def test_a_message_takes_a_tick():
    table = (((Task(F, 0),), (Task(F, 0),)), ((), (Task(B, 0),)), ((Task(B, 0),), ()))
    with pytest.raises(UserError, match="F of microbatch 0, chunk 0, stage 1 in tick 0 needs F"):
        validate(Schedule("hasty", 2, 1, 1, False, table))


def test_a_deadlock_is_told():
    with pytest.raises(UserError, match="deadlocks at tick 2: stage 0 waits for B of microbatch 0"):
        laid_out("stuck", 2, [[Task(F, 0), Task(B, 0), Task(F, 1), Task(B, 1)],
                              [Task(F, 0), Task(F, 1), Task(B, 0), Task(B, 1)]])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "P", "M", "told"),
    [("2f2b", 2, 4, "no '2f2b'"), ("gpipe", 0, 4, "1 or more"), ("interleaved", 4, 6, "multiple")],
)
def test_bad_wishes_are_told(name, P, M, told):
    with pytest.raises(UserError, match=told):
        make(name, P, M)


def test_drawings():
    assert draw.text(make("1f1b", 2, 2)).splitlines() == [
        "stage 0 | F0 F1 .  B0 .  B1",
        "stage 1 | .  F0 B0 F1 B1 .",
    ]
    assert "F0'" in draw.text(make("interleaved", 2, 2))
    assert any(task.kind == W for row in make("zb-h1", 2, 2).table for c in row for task in c)
    figure = draw.figure(make("zb-h1", 2, 4))
    assert len(figure.axes[0].patches) == 2 * 4 * 3
