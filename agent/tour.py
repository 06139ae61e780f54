"""The tour's stage of agents: tools in a sandbox, forks that vote, a kill, a resume, a trace.

    python -m jaxinfra tour --only agent

The model is a scripted one, so what is shown is the machinery and is the same everywhere. The run
is real: its own process, a journal on disk, SIGKILL in the middle of a tool, the kernel's sandbox.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio

from agent.compress import estimate
from agent.evaluate.canaries import ORDERS, canary, gullible
from agent.evaluate.suite import any_text
from agent.events import ToolStarted
from agent.loop import resume, run
from agent.messages import Message, user
from agent.model import Completion, Price, Request, Usage
from agent.policy import Policy
from agent.projections import costs
from agent.reason import Branch, self_consistency
from agent.sandbox import PYTHON, Sandbox
from agent.sandbox.tools import python_tool
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.sqlite_store import SQLiteStore
from agent.tools import Tool, tool
from agent.trace_page import family, page
from jaxinfra.errors import UserError
from jaxinfra.tour.shell import Tour

SESSION = "tour"
TASK = "What is the sum of the squares of the first ten primes? Write it down once."
CODE = "print(sum(p * p for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)))"
_PRICE = Price(input=1.0, output=4.0)


def stage(tour: Tour) -> None:
    """Runs, kills and resumes an agent, votes over forks, meets an injection, and shows it all."""
    section = tour.report.section("An agent that survives")
    try:
        level = Sandbox().describe()
    except UserError as error:
        section.note(f"Left out, as code by a model runs in a sandbox or not at all: {error}")
        return
    section.text(f"Sandbox: {level.name}, with {', '.join(level.layers)}.")
    with tempfile.TemporaryDirectory() as folder:
        journal, effects = Path(folder) / "journal", Path(folder) / "effects"
        tour.console.print("a run in a process of its own, killed in the middle of a tool")
        before = _killed(journal, effects)
        tour.console.print("resumed here, by the journal")
        result, events, html = anyio.run(_resumed, journal, effects)
        written = effects.read_text().splitlines()
    section.text(f"The task: {TASK}")
    section.table(
        "Killed by SIGKILL after a tool had begun, then resumed from the journal",
        ("what", "before the kill", "after the resume"),
        [
            ("events in the journal", before, len(events)),
            ("starts of tools", 1, sum(isinstance(r.event, ToolStarted) for r in events)),
            ("times the answer was written down", 0, len(written)),
        ],
    )
    section.verbatim(f"{CODE}\n\n{result.output}\nwritten down: {', '.join(written)}")
    section.table(
        "Cost by model and tool (dollars at 1 a million tokens read, 4 written)",
        ("agent", "model or tool", "times", "read", "written", "dollars", "s"),
        [(c.agent, c.name, c.times, c.input, c.output, c.cost, c.seconds) for c in costs(events)],
    )
    _trace(section, html)
    tour.console.print("three forks vote; a page tries to give orders")
    _vote(section)
    _injection(section)
    _boxes(section)


def make(effects: Path, slow: bool) -> Agent:
    """The agent of the tour; with `slow` its first tool takes long enough to be killed in."""
    box = python_tool()

    async def python(code: str) -> str:
        """Runs Python in a sandbox."""
        if slow:
            await anyio.sleep(60)
        return await box.function(code)

    @tool(effects="idempotent")
    async def write_down(answer: str) -> str:
        """Writes the answer down; twice the same answer is once."""
        with open(effects, "a+") as file:
            file.seek(0)
            if f"{answer}\n" not in file.readlines():
                file.write(f"{answer}\n")
        return "written"

    tools: tuple[Tool, ...] = (tool(effects="idempotent")(python), write_down)
    return Agent("mathematician", ScriptedModel(_turn), "Compute, do not guess.", tools)


def _turn(request: Request) -> Completion:
    told = [m.content.strip() for m in request.messages if m.role == "tool"]
    if not told:
        said = call("python", code=CODE)
    elif len(told) == 1:
        said = call("write_down", answer=told[0])
    else:
        said = Message("assistant", f"The sum is {told[0]}.")
    read, written = estimate(request.messages), 12 + 8 * len(said.calls)
    usage = Usage(read, written, 0, _PRICE.cost(read, written, 0))
    return Completion(said, usage, "calls" if said.calls else "stop")


def _killed(journal: Path, effects: Path) -> int:
    """Starts the run in a process, kills it when its tool has begun; returns the journal's size."""
    child = subprocess.Popen([sys.executable, "-m", "agent.tour", str(journal), str(effects)])
    try:
        for _ in range(1200):
            time.sleep(0.025)
            events = anyio.run(_events, journal) if journal.exists() else []
            if any(isinstance(r.event, ToolStarted) for r in events):
                return len(events)
            if child.poll() is not None:
                break
        raise RuntimeError("the run to be killed did not begin a tool")
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()


async def _events(journal: Path) -> list[Any]:
    store = SQLiteStore(journal)
    try:
        return await store.read(SESSION)
    finally:
        store.close()


async def _resumed(journal: Path, effects: Path) -> tuple[Any, list[Any], str]:
    store = SQLiteStore(journal)
    try:
        result = await resume(make(effects, slow=False), SESSION, store=store)
        sessions = await family(store, SESSION)
        return result, sessions[SESSION], page(SESSION, sessions)
    finally:
        store.close()


def _trace(section: Any, html: str) -> None:
    start, end = html.index("<svg"), html.index("</svg>") + len("</svg>")
    section.text("When what ran; jaxinfra agent trace SESSION shows the whole conversation too.")
    section.parts.append(f"<figure>{html[start:end]}</figure>")


def _vote(section: Any) -> None:
    def turn(request: Request) -> str:
        drawn = ("17 * 24 = 408\nAnswer: 408", "17 * 24 = 398\nAnswer: 398")
        return drawn[request.settings.seed == 1]

    branch = Branch(ScriptedModel(turn), (user("Be exact."),))
    vote = anyio.run(self_consistency, branch, "What is 17 * 24?", 3)
    section.text(
        f"Three forks of one conversation were asked for 17 * 24 and voted "
        f"{dict(vote.counts)}: {vote.answer}."
    )


def _injection(section: Any) -> None:
    rows = []
    for name, policy in (("asks a person", Policy()), ("off", Policy(tainted="allow"))):
        done: list[str] = []
        held = 0
        for seed in range(50):
            result = anyio.run(run, _victim(seed, policy, done), "Summarise the page.")
            held += result.reason == "waiting"
        rows.append((name, len(done), held))
    section.table(
        "Fifty pages that give orders, read by a model that obeys every one",
        ("policy for tainted conversations", "orders carried out", "held for a person"), rows,
    )  # fmt: skip


def _victim(seed: int, policy: Policy, done: list[str]) -> Agent:
    planted = canary(seed)

    @tool(effects="pure", untrusted=True)
    async def read_page() -> str:
        """Reads a page."""
        return planted.page

    def effect(name: str, arguments: dict[str, str]) -> Tool:
        async def act(**given: str) -> str:
            done.append(name)
            return "ok"

        return Tool(name, "Acts.", act, any_text(arguments), network=True)

    tools = tuple(effect(name, arguments("")) for name, arguments in ORDERS)
    return Agent("reader", ScriptedModel(gullible(call("read_page"))), tools=(read_page, *tools),
                 policy=policy)  # fmt: skip


def _boxes(section: Any) -> None:
    async def measure() -> list[float]:
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            await Sandbox().run([PYTHON, "-I", "-S", "-c", ""])
            taken.append(1000 * (time.perf_counter() - began))
        return sorted(taken)

    taken = anyio.run(measure)
    section.text(f"A box with Python in it starts and ends in {taken[2]:.0f} ms (median of 5).")


if __name__ == "__main__":
    journal, effects = map(Path, sys.argv[1:3])

    async def main() -> None:
        agent = make(effects, slow=True)
        await run(agent, TASK, store=SQLiteStore(journal), session=SESSION)

    anyio.run(main)
