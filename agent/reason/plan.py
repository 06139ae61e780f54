"""Plan and execute: a planner writes steps, an executor does one, the planner revises the rest.

Wang et al., 2023, arXiv:2305.04091. A revision is asked behind all that the planner was asked
before, so that prefix stays cached. Every run has a name of its own under `session`: after a crash
the same call goes on where it was, and no step is done twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import BaseModel, Field

from agent.journal import Store
from agent.loop import run_once
from agent.messages import Message, user
from agent.spec import Agent
from jaxinfra.errors import UserError


class Plan(BaseModel):
    """What is still to be done; an answer instead, when all is done."""

    steps: list[str] = Field(description="what is still to be done, in order")
    answer: str | None = Field(None, description="the final answer, once nothing is left to do")


@dataclass(frozen=True)
class Executed:
    """The answer (None where `max_steps` ended it first), the plans as they were revised, and each
    step with its result."""

    answer: str | None
    plans: list[Plan]
    done: list[tuple[str, str]]


async def plan_and_execute(
    planner: Agent, executor: Agent, task: str, *, store: Store, session: str, max_steps: int = 10
) -> Executed:
    """`planner` needs no tools; `executor` sees the task, the step and the results so far. Raises
    UserError where there is no plan."""
    planner = replace(planner, output_type=Plan)
    plans: list[Plan] = []
    done: list[tuple[str, str]] = []
    asked: tuple[Message, ...] = (user(f"Plan how to do this: {task}"),)
    tainted: tuple[str, ...] = ()
    for n in range(max_steps + 1):
        planned = await run_once(
            planner, asked, store=store, session=f"{session}/plan{n}", tainted_by=tainted
        )
        if planned.reason != "done":
            raise UserError(
                f"plan {session}: the planner ended with {planned.reason}: {planned.detail}"
            )
        plan = planned.output
        plans.append(plan)
        if plan.answer is not None or not plan.steps:
            return Executed(plan.answer, plans, done)
        if n == max_steps:
            break
        step = plan.steps[0]
        known = "\n".join(f"- {s}: {r}" for s, r in done) or "- nothing yet"
        result = await run_once(
            executor, f"The task: {task}\nDone so far:\n{known}\nNow do only this: {step}",
            store=store, session=f"{session}/step{n}", tainted_by=tainted,
        )  # fmt: skip
        tainted = tuple(dict.fromkeys((*tainted, *result.state.tainted_by)))
        outcome = str(result.output) if result.reason == "done" else f"failed: {result.detail}"
        done.append((step, outcome))
        told = f"The step {step!r} gave: {outcome}\nRevise what is left, or answer."
        asked = (*planned.state.messages, user(told))
    return Executed(None, plans, done)
