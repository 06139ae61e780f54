"""What the agent framework costs a turn: two hundred sessions at once, one process, one journal.

    python -m benchmarks.agent_overhead        # a minute, on two idle cores

Every session runs an agent with a scripted model that thinks for a random time around THINK
seconds, then calls a tool; one SQLite journal is flushed at every append. The overhead of a turn is
what passes from the end of a model's thought to the beginning of its next one: parsing, policy,
journal, the tool, and waiting for a processor. The process's CPU time a turn is told beside it, as
it hardly depends on what else runs.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio

from agent.events import RunFinished
from agent.limits import Limits
from agent.loop import run
from agent.model import Completion, Delta, Request
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.sqlite_store import SQLiteStore
from agent.tools import tool

SESSIONS, TURNS, THINK, ROUNDS = 200, 10, 1.0, 5


@dataclass(frozen=True)
class Load:
    """Overheads of all turns in milliseconds, the process's CPU time for each in milliseconds, and
    the events that should be and are there."""

    turns: int
    cpu: float
    p50: float
    p99: float
    longest: float
    seconds: float
    events: int
    expected: int


class _Thinking(ScriptedModel):
    """Notes when each thought ends and the next begins."""

    def __init__(self, turns: int, think: float, seed: int, overheads: list[float]):
        super().__init__([call("double", n=i) for i in range(turns - 1)] + ["done"])
        self._draw, self._think, self._overheads = random.Random(seed), think, overheads
        self._ended: float | None = None

    async def stream(self, request: Request) -> AsyncIterator[Delta | Completion]:
        """See Model."""
        if self._ended is not None:
            self._overheads.append(1000 * (time.perf_counter() - self._ended))
        await anyio.sleep(self._draw.uniform(0.5, 1.5) * self._think)
        async for item in super().stream(request):
            if isinstance(item, Completion):
                self._ended = time.perf_counter()
            yield item


@tool(effects="pure")
async def double(n: int) -> int:
    """Doubles."""
    return 2 * n


async def load(sessions: int, turns: int, think: float, journal: Path) -> Load:
    """Runs the sessions, each `turns` turns of `think` seconds, and measures."""
    store, overheads = SQLiteStore(journal), []
    began, used = time.perf_counter(), time.process_time()

    async def one(i: int) -> None:
        await anyio.sleep(random.Random(i).uniform(0, think))  # they do not all come at once
        model = _Thinking(turns, think, i, overheads)
        agent = Agent("a", model, "Work.", (double,), limits=Limits(turns=turns + 1))
        await run(agent, "go", store=store, session=f"s{i}")

    async with anyio.create_task_group() as group:
        for i in range(sessions):
            group.start_soon(one, i)
    seconds, cpu = time.perf_counter() - began, 1000 * (time.process_time() - used)
    found = [await store.read(f"s{i}") for i in range(sessions)]
    store.close()
    assert all(isinstance(events[-1].event, RunFinished) for events in found)
    ordered = sorted(overheads)
    return Load(
        len(ordered), cpu / (sessions * turns), ordered[len(ordered) // 2],
        ordered[int(len(ordered) * 0.99)], ordered[-1], seconds,
        sum(map(len, found)), sessions * (2 + turns + 2 * (turns - 1)),
    )  # fmt: skip


def main() -> None:
    """Measures and writes the ledger's entry."""
    import jax  # noqa: F401  (so that the conditions name its version)

    from jaxinfra.measure import Entry, environment, write

    sys.setswitchinterval(0.0005)  # as `jaxinfra agent serve` does
    made = []
    for _ in range(ROUNDS):
        with TemporaryDirectory() as folder:
            made.append(anyio.run(load, SESSIONS, TURNS, THINK, Path(folder) / "journal"))
        print(f"{made[-1].p50:.1f} ms (median), {made[-1].p99:.1f} ms (p99), "
              f"{made[-1].cpu:.2f} ms of CPU")  # fmt: skip
        assert made[-1].events == made[-1].expected
    entry = Entry(
        name="agent-overhead-200-sessions",
        claim=f"99th percentile of the overhead a turn, {SESSIONS} agent sessions in one process",
        command="python -m benchmarks.agent_overhead",
        unit="ms",
        samples={"jaxinfra": [one.p99 for one in made]},
        ratio=None,
        interval=None,
        roofline=None,
        roof="none: most of it is waiting for the disk's flush and for a processor",
        inputs=f"{TURNS} turns a session, each a call of a pure tool; thoughts of {THINK / 2:g} to "
        f"{THINK * 1.5:g} s, uniform",
        mislead="The model is scripted and takes no processor; a real one in the same process, or "
        "other work on the machine, lengthens every turn",
        environment=environment(),
        extra={"cpu_ms_a_turn": [one.cpu for one in made],
               "median_ms": [one.p50 for one in made], "longest_ms": [one.longest for one in made],
               "turns_per_second": [one.turns / one.seconds for one in made]},
    )  # fmt: skip
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    main()
