"""Agents that work together, each pattern a function over runs with names of their own.

All of them keep every run in `store` under `session`: the same call after a crash looks up what is
over, goes on with what is not, and does nothing twice. What taints one agent taints whoever reads
its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from agent.gather import gather
from agent.journal import MemoryStore, Store
from agent.loop import Result, run_once
from agent.spec import Agent
from agent.tools import Context, Tool, ToolFailed, as_text, tool

Taint = tuple[str, ...]


def agent_tool(agent: Agent, store: Store | None = None) -> Tool:
    """`agent` as a tool that takes a task and gives its answer. A call is a session of `store`
    named after its key, so a call that a crash cut goes on with the same run; without a store that
    outlives the process it is not repeated. A sub-agent that waits for a person has failed as a
    tool: give the parent the tool that needs approval instead."""
    kept = store or MemoryStore()

    async def delegate(ctx: Context, task: str) -> str:
        result = await run_once(
            agent, task, store=kept, session=f"{ctx.key}:{agent.name}", deps=ctx.deps,
            tainted_by=ctx.tainted_by,
        )  # fmt: skip
        if set(result.state.tainted_by) - set(ctx.tainted_by):
            ctx.taint(agent.name)
        if result.reason != "done":
            waits = [request.reason for request in result.approvals]
            raise ToolFailed(f"{agent.name} ended with {result.reason}: {result.detail or waits}")
        return as_text(result.output)

    delegate.__doc__ = agent.description or f"Gives a task to the agent {agent.name}."
    effects = "write" if store is None else "idempotent"
    return tool(name=agent.name, effects=effects, guarded=False)(delegate)  # its calls are guarded


def supervisor(agent: Agent, workers: Sequence[Agent], store: Store | None = None) -> Agent:
    """`agent` with the workers as its tools: it decides who does what, and they never meet."""
    return replace(agent, tools=(*agent.tools, *(agent_tool(one, store) for one in workers)))


async def sequential(
    agents: Sequence[Agent], task: str, *, store: Store, session: str
) -> list[Result]:
    """Each agent on the output of the one before; ends with the first that is not done."""
    results: list[Result] = []
    tainted: Taint = ()
    for i, agent in enumerate(agents):
        result = await run_once(
            agent, task, store=store, session=f"{session}/{i}-{agent.name}", tainted_by=tainted
        )
        results.append(result)
        if result.reason != "done":
            break
        task, tainted = as_text(result.output), result.state.tainted_by
    return results


async def side_by_side(
    work: Sequence[tuple[Agent, str]], *, store: Store, session: str, width: int = 8,
    tainted_by: Taint = (),
) -> list[Result | Exception]:  # fmt: skip
    """The results in the order of `work`; one that raises does not end the others."""

    async def one(i: int, agent: Agent, task: str) -> Result | Exception:
        name = f"{session}/{i}-{agent.name}"
        try:
            return await run_once(agent, task, store=store, session=name, tainted_by=tainted_by)
        except Exception as error:
            return error

    return await gather((partial(one, i, *what) for i, what in enumerate(work)), width)


async def map_reduce(
    mapper: Agent, tasks: Sequence[str], reducer: Agent, question: str, *, store: Store,
    session: str, width: int = 8,
) -> Result:  # fmt: skip
    """`mapper` on each task side by side, `reducer` on all answers; failures are told as such."""
    mapped = await side_by_side(
        [(mapper, task) for task in tasks], store=store, session=f"{session}/map", width=width
    )
    told = "\n".join(f"{i}. {_answer(result)}" for i, result in enumerate(mapped, 1))
    return await run_once(
        reducer, f"{question}\n{told}", store=store, session=f"{session}/reduce",
        tainted_by=_taint(mapped),
    )  # fmt: skip


class Loop(Exception):
    """The agents say what they have said before: nobody will say anything new."""


@dataclass(frozen=True)
class Said:
    """One contribution to a chat."""

    name: str
    text: str


async def group_chat(
    agents: Sequence[Agent], topic: str, *, store: Store, session: str, rounds: int = 4,
    speaker: Callable[[list[Said]], str | None] | None = None,
) -> list[Said]:  # fmt: skip
    """The agents speak in turn, or as `speaker` of what was said names them (None ends it); each is
    told all that was said. Raises Loop when a whole round repeats the round before."""
    named = {agent.name: agent for agent in agents}
    said: list[Said] = []
    tainted: Taint = ()
    for n in range(rounds * len(agents)):
        name = speaker(said) if speaker is not None else agents[n % len(agents)].name
        if name is None:
            break
        if name not in named:
            raise ValueError(f"group chat: no agent {name!r}; there are {', '.join(named)}")
        shown = "\n".join(f"{one.name}: {one.text}" for one in said) or "nothing yet"
        result = await run_once(
            named[name], f"The topic: {topic}\nSaid so far:\n{shown}\nYou are {name}. Go on.",
            store=store, session=f"{session}/{n}-{name}", tainted_by=tainted,
        )  # fmt: skip
        tainted = _taint([result], tainted)
        said.append(Said(name, _answer(result)))
        size = len(agents)
        if len(said) >= 2 * size and said[-size:] == said[-2 * size : -size]:
            raise Loop(f"group chat {session}: {size} contributions were said twice in a row")
    return said


async def debate(
    debaters: Sequence[Agent], judge: Agent, question: str, *, store: Store, session: str,
    rounds: int = 2,
) -> Result:  # fmt: skip
    """Each answers alone, then sees the others and may change its mind, `rounds` times; the judge
    decides (Du et al., 2023, arXiv:2305.14325)."""
    answers: list[str] = []
    tainted: Taint = ()
    for n in range(rounds):
        work = []
        for i, agent in enumerate(debaters):
            others = [f"- {a}" for j, a in enumerate(answers) if j != i]
            seen = f"\nOthers said:\n{chr(10).join(others)}\nAnswer again." if others else ""
            work.append((agent, question + seen))
        found = await side_by_side(
            work, store=store, session=f"{session}/round{n}", tainted_by=tainted
        )
        answers = [_answer(result) for result in found]
        tainted = _taint(found, tainted)
    shown = "\n".join(f"{i}. {answer}" for i, answer in enumerate(answers, 1))
    return await run_once(
        judge, f"{question}\nThe debaters' answers:\n{shown}\nDecide.", store=store,
        session=f"{session}/judge", tainted_by=tainted,
    )  # fmt: skip


def _answer(result: Result | Exception) -> str:
    """What the others are told of a run."""
    if not isinstance(result, Result):
        return f"(failed: {type(result).__name__}: {result})"
    if result.reason != "done":
        return f"(failed: {result.reason} {result.detail})"
    return as_text(result.output)


def _taint(results: Sequence[Result | Exception], before: Taint = ()) -> Taint:
    more = (n for r in results if isinstance(r, Result) for n in r.state.tainted_by)
    return tuple(dict.fromkeys((*before, *more)))
