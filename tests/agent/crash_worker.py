"""Runs a ten-tool agent that is killed by SIGKILL, resumes it, and says what became of it.

Prints one line of JSON a trial. Each attempt is a forked child with its own event loop and its own
connection to the journal. A trial's points of death are numbers of steps (before and after each
append, before and after each effect) or seconds.
"""

import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import anyio

from agent.loop import resume, run
from agent.messages import to_openai
from agent.postgres_store import PostgresStore
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.sqlite_store import SQLiteStore
from agent.state import fold
from agent.tools import Context, tool

TURNS = 10


class Death:
    """Kills this process at its step number `at`."""

    def __init__(self, at: int | None):
        self.at, self.steps = at, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """A store that dies before or after an append."""

    death: Death

    async def append(self, session, after, events):
        self.death.step()
        kept = await super().append(session, after, events)
        self.death.step()
        return kept


class DyingSQLite(Dying, SQLiteStore):
    pass


class DyingPostgres(Dying, PostgresStore):
    pass


def opened(folder: Path):
    """The journal: the database at the address JOURNAL, else a file in the folder."""
    if address := os.environ.get("JOURNAL"):
        return DyingPostgres(address)
    store = DyingSQLite(folder / "journal.db")
    store._db.execute("PRAGMA synchronous=OFF")  # SIGKILL takes nothing from the page cache
    return store


def agent(folder: Path, death: Death, effects: str, keyed: bool) -> Agent:
    @tool(effects=effects)
    async def effect(ctx: Context, n: int) -> str:
        """A service that keeps keys: a key that it has seen changes nothing."""
        death.step()
        name = ctx.key.replace(":", "_") if keyed else f"{n}-{random.getrandbits(64)}"
        (folder / f"{name}.effect").touch()
        death.step()
        return f"effect {n} done"

    script = [call("effect", f"id{n}", n=n) for n in range(TURNS)]
    return Agent("worker", ScriptedModel([*script, "all done"]), "Work.", (effect,))


async def attempt(folder: Path, death: Death, effects: str, keyed: bool) -> None:
    store = opened(folder)
    store.death = death
    worker = agent(folder, death, effects, keyed)
    if await store.read(folder.name):
        await resume(worker, folder.name, store=store)
    else:
        await run(worker, "go", store=store, session=folder.name)


def child(work, *args) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            anyio.run(functools.partial(work, *args))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid


async def report(folder: Path) -> dict:
    store = opened(folder)
    kept = await store.read(folder.name)
    store.close()
    events, state = [r.event for r in kept], fold(kept)
    return {
        "messages": [to_openai(m) for m in state.messages],
        "finished": state.finished is not None and state.finished.output,
        "effects": len(list(folder.glob("*.effect"))),
        "in_doubt": sum(getattr(e, "error", None) == "in_doubt" for e in events),
        "finishes": sum(e.type == "tool_finished" for e in events),
        "events": len(events),
    }


def trial(folder: Path, deaths: list, effects: str, keyed: bool) -> dict:
    """Attempts with these deaths, then one that lives."""
    folder.mkdir(parents=True)
    killed = 0
    for death in [*deaths, None]:
        at = death if isinstance(death, int) else None
        pid = child(attempt, folder, Death(at), effects, keyed)
        if isinstance(death, float):
            time.sleep(death)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit("an attempt failed")
    return {**anyio.run(report, folder), "killed": killed}


def main() -> None:
    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    for i, (deaths, effects, keyed) in enumerate(plan):
        print(json.dumps(trial(folder / str(i), deaths, effects, keyed)), flush=True)


if __name__ == "__main__":
    main()
