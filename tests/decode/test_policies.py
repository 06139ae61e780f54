"""Agents of many calls beside agents of few: whole runs end sooner, and no call starves."""

import random
from dataclasses import dataclass, field
from statistics import mean

import pytest

from decode.pages import Pages
from decode.policies import FirstCome, LeastAttained
from decode.request import Request, SamplingParams
from decode.scheduler import Scheduler

BUDGET, RUNNING = 64, 6


@dataclass
class Program:
    """An agent's run: rounds of (prompt, answer) tokens that are asked at once, and a pause for
    tools after each, in steps."""

    name: str
    comes: int
    rounds: list[list[tuple[int, int]]]
    pause: int
    ends: int = 0
    left: int = 0  # calls of the round under way
    # Of each call: tokens that were given before it began, and that were asked before it came.
    waits: list[tuple[int, int]] = field(default_factory=list)


def mixed(seed):
    """Forty agents of two to four short calls, one after the other, beside three searches of twelve
    rounds of sixteen longer ones."""
    draw = random.Random(seed)
    few = [
        Program(
            f"few {i}", draw.randrange(2500),
            [[(draw.randint(10, 60), draw.randint(5, 30))] for _ in range(draw.randint(2, 4))],
            draw.randint(1, 20),
        )
        for i in range(40)
    ]  # fmt: skip
    wide = [
        Program(
            f"wide {i}", draw.randrange(100),
            [[(draw.randint(20, 40), draw.randint(20, 40)) for _ in range(16)] for _ in range(12)],
            2,
        )
        for i in range(3)
    ]  # fmt: skip
    return few + wide


def simulate(programs, policy):
    """Runs them to their ends, a step at a time; returns them."""
    scheduler = Scheduler(Pages(400, 16), budget=BUDGET, max_running=RUNNING, policy=policy)
    due = sorted([(p.comes, i, 0) for i, p in enumerate(programs)], reverse=True)
    asked, came, wanted, given, now = {}, {}, 0, 0, 0
    while due or scheduler.waiting or scheduler.running:
        while due and due[-1][0] <= now:
            _, i, at = due.pop()
            programs[i].left = len(programs[i].rounds[at])
            for number, (prompt, answer) in enumerate(programs[i].rounds[at]):
                (made,) = scheduler.add(Request(
                    f"{i} {at} {number}", (1,) * prompt, SamplingParams(max_tokens=answer),
                    program=programs[i].name,
                ))  # fmt: skip
                asked[made], came[made] = (i, at), (given, wanted - given)
                wanted += prompt + answer
        plan = scheduler.plan(float(now))
        for sequence in plan.admitted:
            before, outstanding = came[sequence]
            programs[asked[sequence][0]].waits.append((given - before, outstanding))
        given += plan.tokens
        scheduler.computed(plan, [[1] * chunk.makes for chunk in plan.chunks])
        now += 1
        for sequence in [s for s in scheduler.running if not s.left]:
            scheduler.end(sequence)
            i, at = asked[sequence]
            programs[i].left -= 1
            if programs[i].left == 0 and at + 1 < len(programs[i].rounds):
                due.append((now + programs[i].pause, i, at + 1))
                due.sort(reverse=True)
            programs[i].ends = now
    return programs


def completion(programs):
    return mean(p.ends - p.comes for p in programs)


@pytest.mark.parametrize("seed", range(3))
def test_runs_end_sooner_by_half_and_no_call_starves(seed):
    patience = 4000
    first = simulate(mixed(seed), FirstCome())
    least = simulate(mixed(seed), LeastAttained(patience=patience))
    assert completion(first) >= 1.5 * completion(least)
    # No work is lost: the last run ends when it did.
    assert max(p.ends for p in least) <= 1.1 * max(p.ends for p in first)
    assert within(least, patience)


def within(programs, patience):
    """Whether each call, once overdue, waited for those alone that came before it, and for what
    ran already."""
    calls = [call for p in programs for several in p.rounds for call in several]
    waits = [wait for p in programs for wait in p.waits]
    assert len(waits) == len(calls)
    running = RUNNING * max(map(sum, calls))
    return all(wait <= patience + outstanding + running for wait, outstanding in waits)


def test_without_patience_a_call_starves():
    """The control: a run of many calls waits for as long as short ones keep coming."""
    waits = {}
    for patience in (3000, 1 << 40):
        programs = [Program("long", 0, [[(60, 60)] * 16] * 2, 0)] + [
            Program(f"short {i}", 2 * i, [[(50, 14)]], 0) for i in range(900)
        ]
        simulate(programs, LeastAttained(quantum=64, patience=patience))
        waits[patience] = within(programs, 3000)
    assert waits == {3000: True, 1 << 40: False}


def test_calls_of_no_program_go_by_arrival():
    policy = LeastAttained()
    scheduler = Scheduler(Pages(50, 4), budget=8, max_running=8, policy=policy)
    made = [scheduler.add(Request(str(i), (1,) * 3))[0] for i in range(4)]
    policy.served(made[0], 10_000)
    assert sorted(made[::-1], key=policy.rank) == made


def test_an_old_program_is_forgotten(monkeypatch):
    monkeypatch.setattr("decode.policies._PROGRAMS", 2)
    policy, scheduler = LeastAttained(quantum=1), Scheduler(Pages(50, 4), budget=8, max_running=8)
    made = [scheduler.add(Request(p, (1,) * 3, program=p))[0] for p in "abc"]
    for sequence in made:
        policy.served(sequence, 8)
    assert [policy.rank(s)[0] for s in made] == [1, 5, 5]
