"""What the framework itself costs a turn, under many sessions at once.

    python -m agent.evaluate.load --sessions 200 --turns 10 --think 1.0

Every session runs an agent with a scripted model that thinks for a random time around `think`
seconds, then calls a tool, in one process with one SQLite journal that is flushed at every append.
The overhead of a turn is what passes from the end of a model's thought to the beginning of its next
one: parsing, policy, journal, the tool, and waiting for a processor.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Load:
    """Overheads of all turns in milliseconds, and the events that should be and are there."""

    turns: int
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
    """Runs the sessions and measures; see the module's docstring."""
    store, overheads = SQLiteStore(journal), []
    began = time.perf_counter()

    async def one(i: int) -> None:
        await anyio.sleep(random.Random(i).uniform(0, think))  # they do not all come at once
        model = _Thinking(turns, think, i, overheads)
        agent = Agent("a", model, "Work.", (double,), limits=Limits(turns=turns + 1))
        await run(agent, "go", store=store, session=f"s{i}")

    async with anyio.create_task_group() as group:
        for i in range(sessions):
            group.start_soon(one, i)
    seconds = time.perf_counter() - began
    found = [await store.read(f"s{i}") for i in range(sessions)]
    store.close()
    assert all(isinstance(events[-1].event, RunFinished) for events in found)
    ordered = sorted(overheads)
    return Load(
        len(ordered), ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)], ordered[-1],
        seconds, sum(map(len, found)), sessions * (2 + turns + 2 * (turns - 1)),
    )  # fmt: skip


def main(sessions: int = 200, turns: int = 10, think: float = 1.0) -> None:
    """Prints the overheads.

    Args:
      sessions: side by side.
      turns: of each.
      think: seconds that the model takes for a turn, on average.
    """
    sys.setswitchinterval(0.0005)  # as `jaxinfra agent serve` does
    with TemporaryDirectory() as folder:
        made = anyio.run(load, sessions, turns, think, Path(folder) / "journal")
    print(
        f"{sessions} sessions, {turns} turns, {think:g} s a thought; overhead a turn: "
        f"{made.p50:.1f} ms (median), {made.p99:.1f} ms (p99), {made.longest:.1f} ms (longest); "
        f"{made.turns / made.seconds:.0f} turns/s; {made.events} of {made.expected} events"
    )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
