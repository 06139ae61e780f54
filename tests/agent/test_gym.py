"""reasoning-gym's tasks in the runner: its verifiers decide, and a tool may do the work."""

import functools
import re

import anyio
import pytest

from agent.evaluate.runner import Task, evaluate, summary
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.tools import tool
from jaxinfra.errors import UserError

pytest.importorskip("reasoning_gym", reason="reasoning-gym has no wheel for this Python")
from agent.evaluate.gym import gym_tasks


@tool(effects="pure")
async def add_up(numbers: list[int]) -> int:
    """The sum."""
    return sum(numbers)


def numbers_of(text: str) -> list[int]:
    asked = re.search(r"[-\d][-+\d ]+\d", text.split("\n\n", 1)[1])
    assert asked is not None
    return [int(n.replace(" ", "")) for n in re.findall(r"[-+]?\s*\d+", asked[0])]


def with_the_tool(request):
    told = [m.content for m in request.messages if m.role == "tool"]
    numbers = numbers_of(request.messages[-1].content) if not told else []
    return call("add_up", numbers=numbers) if not told else f"I added.\nAnswer: {told[0]}"


def tried(make, tasks: list[Task], repeats=1):
    return anyio.run(functools.partial(
        evaluate, lambda task: Agent("x", ScriptedModel(make)), lambda repeat: tasks,
        repeats=repeats,
    ))  # fmt: skip


def test_a_tool_solves_sums_and_a_guess_does_not():
    tasks = gym_tasks("chain_sum", range(10), tools=(add_up,), config={"max_terms": 4})
    good = tried(with_the_tool, tasks)
    assert [t.fault for t in good if t.fault] == [] and len(good) == 10
    assert all(t.called == 1 for t in good)
    wrong = tried(lambda request: "Answer: 7", tasks)
    assert not any(t.passed for t in wrong) and "'7' scores" in (wrong[0].fault or "")
    assert summary(wrong)[-1].success == 0


def test_a_seed_is_a_task_and_faults_name_the_fix():
    one, same, other = (gym_tasks("gcd", [seed])[0] for seed in (3, 3, 4))
    assert one.stages == same.stages != other.stages
    with pytest.raises(UserError, match="no dataset 'sums'"):
        gym_tasks("sums")
    with pytest.raises(UserError, match=r"reasoning-gym gcd: .*nothing"):
        gym_tasks("gcd", config={"nothing": 1})
