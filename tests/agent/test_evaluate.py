"""Evaluation: the suite passes who solves it and fails who does not, kind by kind; the figures are
those of their formulas."""

import functools
import itertools
import json
import math
import re

import anyio
import pytest

from agent.evaluate.canaries import orders_in
from agent.evaluate.runner import Task, Try, evaluate, pass_hat, summary, wilson
from agent.evaluate.suite import KINDS, suite
from agent.messages import Message, ToolCall
from agent.model import Request
from agent.policy import Policy
from agent.scripted import ScriptedModel, call
from agent.spec import Agent


def wanted_calls(task: Task) -> list[Message]:
    dump = functools.partial(json.dumps, default=str)
    return [
        Message("assistant", calls=(ToolCall("", name, dump(arguments)),))
        for name, arguments in task.calls
    ]


def solver(task: Task):
    """Knows how each kind is solved: the wanted calls, then an answer out of their results."""

    def turn(request: Request) -> Message | str:
        told = [m.content for m in request.messages if m.role == "tool"]
        asked = request.messages[-1].content if request.messages[-1].role == "user" else ""
        if task.kind == "i":
            if asked.startswith("Remember"):
                return call("remember", text=asked.removeprefix("Remember: "))
            if asked:
                return call("recall", query=asked)
            if told[-1].startswith("kept"):
                return "noted"
            name = re.search(r"is (\w+)'s locker", request.messages[-3].content).group(1)  # pyright: ignore
            return re.search(rf"{name}'s locker is number (\d+)", told[-1]).group(1)  # pyright: ignore
        if task.kind == "e":
            return "I cannot."
        plan = wanted_calls(task)
        if len(told) < len(plan):
            return plan[len(told)]
        if task.kind == "g":
            return f"Together they are {sum(map(int, told))}."
        if task.kind == "h":
            return re.search(r"safe is (\d+)", " ".join(told)).group(1)  # pyright: ignore
        if task.kind == "j":
            return re.search(r"9 to (\d+)", told[0]).group(1)  # pyright: ignore
        return "done" if task.kind == "d" else f"It is {told[-1]}."

    return turn


def guesser(task: Task):
    return lambda request: "7"


def impatient(task: Task):
    """Makes the wanted calls but for the last, and answers as the solver would."""

    def turn(request: Request) -> Message | str:
        told = [m.content for m in request.messages if m.role == "tool"]
        plan = wanted_calls(task)[:-1]
        return plan[len(told)] if len(told) < len(plan) else f"It is {(told or ['0'])[-1]}."

    return turn


def obedient(task: Task):
    """Does whatever a page says."""

    def turn(request: Request) -> Message | str:
        told = " ".join(m.content for m in request.messages if m.role == "tool")
        said = [c.name for m in request.messages for c in m.calls]
        orders = [c for c in orders_in(told) if c.name not in said]
        if orders:
            return Message("assistant", calls=tuple(orders))
        return solver(task)(request)

    return turn


def babbler(task: Task):
    """Calls every tool with nonsense, then says a number."""

    def turn(request: Request) -> Message | str:
        if any(m.role == "tool" for m in request.messages):
            return "12345"
        return Message("assistant", calls=tuple(
            ToolCall("", tool.name, '{"nonsense": 1}') for tool in request.tools
        ))  # fmt: skip

    return turn


def attempt(make, kinds="abcdefghij", difficulty=2, policy=None, repeats=2, seeds=(0, 1, 2)):
    def agent(task: Task) -> Agent:
        return Agent("x", ScriptedModel(make(task)), policy=policy or Policy())

    tasks = functools.partial(suite, seeds, difficulty=difficulty, kinds=kinds)
    return anyio.run(functools.partial(
        evaluate, agent, lambda repeat: tasks(), repeats=repeats
    ))  # fmt: skip


@pytest.mark.parametrize("difficulty", [1, 2, 4])
def test_who_solves_the_suite_passes_every_task(difficulty):
    tries = attempt(solver, difficulty=difficulty, repeats=1)
    assert [t.fault for t in tries if not t.passed] == [] and len(tries) == 3 * len(KINDS)
    lines = {line.kind: line for line in summary(tries)}
    assert lines["all"].success == lines["all"].pass_k == lines["all"].arguments == 1.0
    assert lines["all"].malformed == 0.0
    assert lines["f"].recovery == 1.0


WRONG = [
    (babbler, "abcdfghij"), (guesser, "abcdefghi"), (impatient, "abdfg"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kinds"), WRONG, ids=[w[0].__name__ for w in WRONG])
def test_who_does_not_solve_it_fails(make, kinds):
    kinds = kinds.replace("j", "")  # what is wrong there is an effect, below
    tries = attempt(make, kinds=kinds)
    passed = {(t.kind, t.seed) for t in tries if t.passed}
    assert len(passed) <= 1, passed  # one lucky guess at most


def test_who_obeys_a_page_fails_and_the_policy_stops_it():
    tries = attempt(obedient, "j", policy=Policy(tainted="allow"), seeds=range(20), repeats=1)
    assert all("it obeyed" in (t.fault or "") for t in tries) and len(tries) == 20
    tries = attempt(obedient, "j", policy=Policy(tainted="deny"), seeds=range(20), repeats=1)
    assert all(t.passed for t in tries)


def test_malformed_calls_and_arguments_are_counted():
    lines = {line.kind: line for line in summary(attempt(babbler, "ac", difficulty=2))}
    assert lines["a"].malformed == 1.0 and lines["a"].arguments == 0.0
    lines = {line.kind: line for line in summary(attempt(impatient, "g", difficulty=2))}
    assert lines["g"].arguments == 0.75


def test_seeds_make_the_same_task_and_other_seeds_another():
    def asked(task: Task) -> str:
        task.close()
        return " ".join(str(stage.prompt) for stage in task.stages) + str(task.calls)

    for kind, make in KINDS.items():
        assert asked(make(3, 2)) == asked(make(3, 2))
        if kind not in "fhj":
            assert len({asked(make(seed, 2)) for seed in range(6)}) > 2


def made(kind: str, seed: int, passed: bool, repeat: int) -> Try:
    return Try(
        kind, seed, repeat, None if passed else "x", "done", 1, 10, 0.5, 1.0, 2, 0, 0, 1, 1, ""
    )


def test_figures_are_those_of_their_formulas():
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # by hand
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(0, 0) == (0, 1)
    outcomes = {1: [1, 1, 1, 0], 2: [1, 1, 1, 1], 3: [0, 0, 0, 1]}
    tries = [made("a", s, bool(p), i) for s, ps in outcomes.items() for i, p in enumerate(ps)]
    for k in (1, 2, 4):
        exact = []
        for ps in outcomes.values():  # all ways to draw k tries of a task
            drawn = list(itertools.combinations(ps, k))
            exact.append(sum(all(d) for d in drawn) / len(drawn))
        assert math.isclose(pass_hat(tries, k), sum(exact) / 3)
    assert pass_hat(tries, 9) == pass_hat(tries, 4)
    line = summary(tries)[-1]
    assert line.success == 8 / 12 and line.cost == 12 * 0.5 / 8
    nothing = summary([made("a", 1, False, 0)])[-1]
    assert nothing.cost == math.inf and math.isnan(nothing.recovery)
