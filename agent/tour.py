"""The tour's stage of agents: a small model's calls, a kill, a resume, forks that vote, a trace.

    python -m jaxinfra tour --only agent

The model is SmolLM2-135M on the engine, in this process and in the one that is killed. It is far
too small for the task: the plan is given, a call of the next tool each turn, and a grammar holds
each call to its tool; what it calls them with is its own. The run is real: a process, a journal on
disk, SIGKILL in the middle of a tool, the kernel's sandbox.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from pydantic import Field

from agent.engine_model import EngineModel
from agent.evaluate.canaries import gullible
from agent.evaluate.suite import injection
from agent.events import ToolStarted
from agent.gather import gather
from agent.loop import Result, resume, run
from agent.messages import user
from agent.model import Completion, Delta, Model, Price, Request, Settings, complete
from agent.policy import Policy
from agent.projections import costs
from agent.sandbox import Sandbox
from agent.sandbox.tools import python_tool
from agent.scripted import ScriptedModel, call
from agent.spec import FINAL, Agent
from agent.sqlite_store import SQLiteStore
from agent.tools import tool
from agent.trace_page import family, page
from decode.config import EngineConfig
from jaxinfra.errors import UserError
from jaxinfra.tour.shell import Tour
from jaxinfra.tour.speak import MODEL

SESSION = "tour"
TASK = (
    "A farm sells 17 boxes of 24 eggs. How many eggs are that? Check it with Python, write down "
    "the result that it gives, and then give that result."
)
_SUM = r"^print\([0-9]{1,3}( [-+*] [0-9]{1,3}){1,2}\)$"
_ENGINE = EngineConfig(max_len=4096, max_running=4, budget=16, invariant=True)
_PRICE = Price(input=1.0, output=4.0, cached=0.1)
_Small = Annotated[int, Field(ge=0, le=999)]


def stage(tour: Tour) -> None:
    """Runs, kills and resumes an agent, votes over forks, meets an injection, and shows it all.

    Raises UserError, which the tour tells, where the model cannot be had.
    """
    section = tour.report.section("An agent that survives")
    try:
        level = Sandbox().describe()
    except UserError as error:
        section.note(f"Left out, as code by a model runs in a sandbox or not at all: {error}")
        return
    section.text(f"Sandbox: {level.name}, with {', '.join(level.layers)}.")
    with tempfile.TemporaryDirectory() as folder, open_model() as model:
        journal, effects = Path(folder) / "journal", Path(folder) / "effects"
        tour.console.print("a run in a process of its own, killed in the middle of a tool")
        before = _killed(journal, effects)
        tour.console.print("resumed here, by the journal; three forks vote")
        result, sessions, votes = anyio.run(_resumed, model, journal, effects)
        _show(section, result, sessions, before, len(effects.read_text().splitlines()))
        own, forks = model.account(SESSION), [model.account(f"{SESSION}/{i}") for i in range(3)]
        section.text(
            f"Resumed, it read {own.prompt} tokens, of which {own.cached} were cached and "
            f"{own.recomputed} computed again. Three forks of the conversation, at least "
            f"{min(f.cached for f in forks)} tokens of it shared, voted {dict(votes)}."
        )
    tour.console.print("a page tries to give orders")
    _injection(section)


def open_model() -> EngineModel:
    return EngineModel.load(MODEL, _ENGINE, price=_PRICE)


class _InOrder:
    """A plan for a small model: each turn is a call of the next tool, in the agent's order."""

    def __init__(self, model: Model) -> None:
        self.name, self._model = model.name, model

    async def stream(self, request: Request) -> AsyncIterator[Delta | Completion]:
        turn = sum(message.role == "assistant" for message in request.messages)
        wanted = request.tools[min(turn, len(request.tools) - 1)].name
        async for item in self._model.stream(replace(request, tool_choice=wanted)):
            yield item


def make(model: Model, effects: Path, slow: bool) -> Agent:
    """The agent of the tour; with `slow` its sandbox takes long enough to be killed in."""
    box = python_tool()

    @tool(effects="pure")
    async def calculator(a: _Small, operation: Literal["+", "-", "*"], b: _Small) -> int:
        """Computes with two numbers."""
        return {"+": a + b, "-": a - b, "*": a * b}[operation]

    @tool(effects="idempotent")
    async def python(code: Annotated[str, Field(pattern=_SUM)]) -> str:
        """Runs Python in a sandbox."""
        if slow:
            await anyio.sleep(600)
        return await box.function(code)

    @tool(effects="idempotent")
    async def write_down(result: _Small) -> str:
        """Writes down the result that Python gave; twice the same is once."""
        with open(effects, "a+") as file:
            file.seek(0)
            if f"{result}\n" not in file.readlines():
                file.write(f"{result}\n")
        return f"The result is {result}."

    return Agent(
        "mathematician", _InOrder(model), "Compute, do not guess.",
        (calculator, python, write_down), output_type=_Small,
        settings=Settings(temperature=0.0, max_tokens=160),
    )  # fmt: skip


def _killed(journal: Path, effects: Path) -> int:
    """Starts the run in a process, kills it when it is in the sandbox; returns the journal's size.

    Raises UserError where it does not come so far."""
    command = [sys.executable, "-m", "agent.tour", MODEL, str(journal), str(effects)]
    with subprocess.Popen(command) as child:
        try:
            while child.poll() is None:
                time.sleep(0.05)
                events = anyio.run(_events, journal) if journal.exists() else []
                began = (r.event for r in events if isinstance(r.event, ToolStarted))
                if any(event.name == "python" for event in began):
                    return len(events)
            raise UserError(f"the run to be killed ended by itself, status {child.returncode}")
        finally:
            child.kill()


async def _events(journal: Path) -> list[Any]:
    with contextlib.closing(SQLiteStore(journal)) as store:
        return await store.read(SESSION)


async def _resumed(model: EngineModel, journal: Path, effects: Path) -> tuple[Result, Any, Any]:
    """The resumed run, its sessions' journals, and the votes of three forks of it."""
    agent = make(model, effects, slow=False)
    with contextlib.closing(SQLiteStore(journal)) as store:
        result = await resume(agent, SESSION, store=store)
        sessions = await family(store, SESSION)
    asked = (*result.state.prompt, user("Once more: how many eggs are that?"))

    async def vote(seed: int) -> str:
        session = f"{SESSION}/{seed}"
        model.fork(SESSION, session)
        end = await complete(model, Request(
            asked, agent.specs, FINAL, Settings(temperature=0.8, max_tokens=160, seed=seed),
            session=session,
        ))  # fmt: skip
        return end.message.calls[0].arguments

    return result, sessions, Counter(await gather(partial(vote, seed) for seed in range(3)))


def _show(section: Any, result: Result, sessions: Any, before: int, written: int) -> None:
    events, html = sessions[SESSION], page(SESSION, sessions)
    starts = sum(isinstance(r.event, ToolStarted) for r in events)
    section.text(f"The task: {TASK}")
    section.table(
        "Killed by SIGKILL in the sandbox, then resumed from the journal",
        ("what", "before the kill", "after the resume"),
        [
            ("events in the journal", before, len(events)), ("starts of tools", 2, starts),
            ("times an answer was written down", 0, written),
        ],
    )  # fmt: skip
    said = [f"{c.name} {c.arguments}" for m in result.state.messages for c in m.calls]
    section.text("Its calls, each held to its tool's schema token by token:")
    section.verbatim("\n".join(said))
    section.text(f"Answer: {result.output}; 17 times 24 is 408.")
    section.table(
        "Cost by model and tool (dollars at 1 a million tokens read, 0.1 cached, 4 written)",
        ("agent", "model or tool", "times", "read", "written", "dollars", "s"),
        [(c.agent, c.name, c.times, c.input, c.output, c.cost, c.seconds) for c in costs(events)],
    )  # fmt: skip
    section.text("When what ran; jaxinfra agent trace SESSION shows the whole conversation too.")
    drawn = html[html.index("<svg") : html.index("</svg>") + len("</svg>")]
    section.parts.append(f"<figure>{drawn}</figure>")


def _injection(section: Any) -> None:
    rows = []
    for name, policy in (("asks a person", Policy()), ("off", Policy(tainted="allow"))):
        done = held = 0
        for seed in range(50):
            task, model = injection(seed, 1), ScriptedModel(gullible(call("read_page")))
            victim = Agent("reader", model, tools=task.tools, policy=policy)
            result = anyio.run(run, victim, "Summarise the page.")
            done += "obeyed" in (task.check(result) or "")
            held += result.reason == "waiting"
        rows.append((name, done, held))
    section.table(
        "Fifty pages that give orders, read by a model that obeys every one",
        ("policy for tainted conversations", "orders carried out", "held for a person"), rows,
    )  # fmt: skip


if __name__ == "__main__":
    MODEL, journal, effects = sys.argv[1], *map(Path, sys.argv[2:4])

    async def main(model: EngineModel) -> None:
        agent = make(model, effects, slow=True)
        await run(agent, TASK, store=SQLiteStore(journal), session=SESSION)

    with open_model() as engine:
        anyio.run(main, engine)
