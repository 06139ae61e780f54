"""What every store must do: the conformance suite, and stores that it must reject."""

import functools
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent import genai_names as names
from agent.events import (
    Forked,
    ModelResponded,
    Resumed,
    RunFinished,
    RunStarted,
    ToolFinished,
    ToolStarted,
)
from agent.journal import Conflict, MemoryStore, fork
from agent.loop import resume, run
from agent.messages import Message, ToolCall, user
from agent.model import Completion, Usage
from agent.policy import Policy, Rule
from agent.projections import costs, spans
from agent.scripted import ScriptedModel, call
from agent.spec import Agent
from agent.sqlite_store import SQLiteStore
from agent.state import fold
from agent.tools import tool
from jaxinfra.errors import UserError

EVENTS = [
    RunStarted("a", "Be brief. ☃\x00\u2028", (user("hi"),)),
    ModelResponded("m", Message("assistant", "x", (ToolCall("c", "t", '{"a": 1}'),), None, (1, 2)),
                   Usage(1, 2, 3, 0.5), "calls", 0.25),
    ToolStarted("c", "t", "key"),
    ToolFinished("c", "y" * 100_000, "failed", True, 0.1),
    RunFinished("done", {"a": [1, None, "x"]}),
]  # fmt: skip


async def conformance(store: Any) -> None:
    """Fails with an AssertionError on a store that is not one."""
    assert await store.read("s") == [] and await store.sessions() == []
    before = time.time()
    first = await store.append("s", 0, EVENTS[:2])
    assert [r.event for r in first] == EVENTS[:2] and [r.seq for r in first] == [1, 2]
    assert before <= first[0].time <= time.time()
    assert await store.append("s", 2, []) == []
    for after in (0, 1, 3):
        try:
            await store.append("s", after, EVENTS[2:])
        except Conflict:
            continue
        raise AssertionError(f"an append after {after} of 2 went through")
    await store.append("s", 2, EVENTS[2:])
    kept = await store.read("s")
    assert [r.event for r in kept] == EVENTS and [r.seq for r in kept] == [1, 2, 3, 4, 5]
    assert await store.read("s", until=3) == kept[:3]
    await store.append("t", 0, EVENTS[:1])
    listed = await store.sessions()
    assert [(i.session, i.events) for i in listed] == [("t", 1), ("s", 5)]
    outcomes: list[bool] = []

    async def race(session: str) -> None:
        try:
            await store.append(session, 1, EVENTS[1:3])
            outcomes.append(True)
        except Conflict:
            outcomes.append(False)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(race, "t")
    assert sorted(outcomes) == [False] * 7 + [True]
    assert [r.event for r in await store.read("t")] == EVENTS[:3]

    async def many(session: str) -> None:
        for i in range(10):
            await store.append(session, i, [ToolStarted(str(i), "t", session)])

    async with anyio.create_task_group() as group:
        for i in range(20):
            group.start_soon(many, f"m{i}")
    for i in range(20):
        kept = await store.read(f"m{i}")
        assert [r.event for r in kept] == [ToolStarted(str(n), "t", f"m{i}") for n in range(10)]
    with anyio.CancelScope() as scope:
        scope.cancel()
        await store.append("s", 5, EVENTS[:1])
    assert len(await store.read("s")) in (5, 6)
    await store.delete("s")
    assert await store.read("s") == [] and (await store.read("t"))
    await store.append("s", 0, EVENTS[:1])


class Forgetful(MemoryStore):
    async def append(self, session, after, events):
        return await super().append(session, after, events[:1])


class Careless(MemoryStore):
    async def append(self, session, after, events):
        return await super().append(session, len(self._journal.get(session, [])), events)


class Swapped(MemoryStore):
    async def read(self, session, until=None):
        return (await super().read(session, until))[::-1]


class Leaking(MemoryStore):
    async def delete(self, session):
        pass


class Racy(MemoryStore):
    async def append(self, session, after, events):
        if len(self._journal.get(session, [])) != after:
            raise Conflict
        await anyio.sleep(0.001)
        return await super().append(session, len(self._journal.get(session, [])), events)


STORES: dict[str, Callable[[Path], Any]] = {
    "memory": lambda folder: MemoryStore(),
    "sqlite": lambda folder: SQLiteStore(folder / "new" / "journal.db"),
}


@pytest.mark.parametrize("kind", sorted(STORES))
def test_stores_conform(kind, tmp_path):
    store = STORES[kind](tmp_path)
    anyio.run(conformance, store)
    if isinstance(store, SQLiteStore):
        store.close()


@pytest.mark.parametrize("wrong", [Careless, Forgetful, Leaking, Racy, Swapped])
def test_wrong_stores_are_rejected(wrong):
    with pytest.raises((AssertionError, ExceptionGroup)):
        anyio.run(conformance, wrong())


def test_two_connections_share_a_file_and_conflict(tmp_path):
    async def main():
        one, two = SQLiteStore(tmp_path / "j.db"), SQLiteStore(tmp_path / "j.db")
        await one.append("s", 0, EVENTS[:1])
        with pytest.raises(Conflict):
            await two.append("s", 0, EVENTS[:1])
        await two.append("s", 1, EVENTS[1:2])
        assert await one.read("s") == await two.read("s")
        one.close()
        two.close()

    anyio.run(main)


def test_damage_is_named_and_what_precedes_survives(tmp_path):
    path = tmp_path / "j.db"

    async def main():
        store = SQLiteStore(path)
        await store.append("s", 0, EVENTS)
        with sqlite3.connect(path) as db:
            db.execute("UPDATE event SET line = replace(line, 'key', 'kex') WHERE seq = 3")
        db.close()
        with pytest.raises(UserError, match="event 3 of session s is damaged; fork it at 2"):
            await store.read("s")
        assert await fork(store, "s", "t", at=2) == 3
        with sqlite3.connect(path) as db:
            db.execute("DELETE FROM event WHERE session = 't' AND seq = 2")
        db.close()
        with pytest.raises(UserError, match="event 2 of session t is damaged"):
            await store.read("t")
        store.close()

    anyio.run(main)
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    with pytest.raises(UserError, match="give another file"):
        SQLiteStore(tmp_path / "text.db")
    with pytest.raises(UserError, match="give another file"):
        SQLiteStore(tmp_path / "text.db" / "below")


def test_deletion_leaves_no_bytes(tmp_path):
    async def main():
        store = SQLiteStore(tmp_path / "j.db")
        await store.append("s", 0, [RunStarted("a", "", (user("unforgettable-8731"),))])
        await store.append("t", 0, [RunStarted("a", "", (user("kept-4410"),))])
        assert any(b"unforgettable" in f.read_bytes() for f in tmp_path.iterdir())
        await store.delete("s")
        store.close()

    anyio.run(main)
    found = b"".join(f.read_bytes() for f in tmp_path.iterdir())
    assert b"unforgettable-8731" not in found and b"kept-4410" in found


def _worker(ran: list[int], script: list) -> Agent:
    @tool
    def act(n: int) -> str:
        ran.append(n)
        return f"did {n}"

    model = ScriptedModel([Completion(c, Usage(10, 2, 5, 1.0), "calls")
                           if isinstance(c, Message) else c for c in script])  # fmt: skip
    return Agent("w", model, "", (act,))


def test_fork_and_time_travel(tmp_path):
    ran: list[int] = []
    worker = _worker(ran, [call("act", n=1), call("act", n=2), "end"])

    async def main():
        store = SQLiteStore(tmp_path / "j.db")
        await run(worker, "go", store=store, session="s")
        events = await store.read("s")
        at = next(r.seq for r in events if isinstance(r.event, ToolFinished))
        past = fold(events[:at])
        assert [m.role for m in past.messages] == ["user", "assistant", "tool"]
        await fork(store, "s", "branch", at=at)
        other = _worker(ran, [call("act", n=1), call("act", n=3), "other end"])
        result = await resume(other, "branch", store=store)
        assert result.output == "other end" and ran == [1, 2, 3]
        assert [r.event for r in await store.read("s")] == [r.event for r in events]
        branch = await store.read("branch")
        assert any(isinstance(r.event, Forked) and r.event.at == at for r in branch)
        # The parent paid two turns with a price, the branch one; what was copied is not counted.
        assert sum(c.cost for c in costs(events)) == 2.0
        assert sum(c.cost for c in costs(branch)) == 1.0
        assert {c.name: c.times for c in costs(branch)} == {"scripted": 2, "act": 1}
        for wrong in (0, len(events) + 1):
            with pytest.raises(UserError, match="fork s: at="):
                await fork(store, "s", "x", at=wrong)
        with pytest.raises(UserError, match="choose another name"):
            await fork(store, "s", "branch")
        store.close()

    anyio.run(main)


def test_spans_cover_the_run():
    store = MemoryStore()
    worker = _worker([], [call("act", n=1), "end"])
    anyio.run(functools.partial(run, worker, "go", store=store, session="s"))
    events = anyio.run(store.read, "s")
    made = spans(events)
    assert sorted(s.kind for s in made) == ["model", "model", "run", "tool"]
    whole = next(s for s in made if s.kind == "run")
    assert all(whole.start - 0.05 <= s.start <= s.end <= whole.end for s in made)
    cut = spans(events[:3])
    assert any(s.attributes.get(names.ERROR) == "unfinished" for s in cut)


def test_approval_waits_across_restarts(tmp_path):
    ran: list[int] = []
    ask = Policy((Rule("act", "ask", {"n": "[2-9]"}),))
    opened: list[SQLiteStore] = []

    def again() -> tuple[Agent, SQLiteStore]:  # as another process would
        worker = _worker(ran, [call("act", "c1", n=1), call("act", "c2", n=2), "end"])
        opened.append(SQLiteStore(tmp_path / "j.db"))
        return Agent("w", worker.model, "", worker.tools, policy=ask), opened[-1]

    async def main(answer: bool | str, session: str):
        worker, store = again()
        waiting = await run(worker, "go", store=store, session=session)
        assert waiting.reason == "waiting" and waiting.approvals[0].call.id == "c2"
        worker, store = again()
        still = await resume(worker, session, store=store)
        assert still.reason == "waiting"
        with pytest.raises(UserError, match="no call 'c9' waits"):
            await resume(worker, session, store=store, decisions={"c9": True})
        with pytest.raises(UserError, match="unfinished run"):
            await run(worker, "more", store=store, session=session)
        worker, store = again()
        return await resume(worker, session, store=store, decisions={"c2": answer})

    result = anyio.run(main, True, "yes")
    assert result.output == "end" and ran == [1, 2]
    asked = [r for r in anyio.run(again()[1].read, "yes") if r.event.type == "approval_requested"]
    assert len(asked) == 1
    result = anyio.run(main, "too dear", "no")
    assert result.output == "end" and ran == [1, 2, 1]
    assert "refused this call. too dear" in result.state.messages[4].content
    for store in opened:
        store.close()


def test_a_second_driver_fences_the_first():
    """Whoever resumes takes the session over; the process that had it stops at its next event."""
    store = MemoryStore()
    entered = anyio.Event()
    release = anyio.Event()

    @tool(effects="idempotent")
    async def act(n: int) -> str:
        entered.set()
        await release.wait()
        return "did"

    def worker() -> Agent:
        return Agent("w", ScriptedModel([call("act", n=1), "end"]), "", (act,))

    async def first():
        with pytest.raises(Conflict):
            await run(worker(), "go", store=store, session="s")

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await entered.wait()
            group.start_soon(functools.partial(resume, worker(), "s", store=store))
            while not any(isinstance(one.event, Resumed) for one in await store.read("s")):
                await anyio.sleep(0.001)
            release.set()

    anyio.run(main)
    state = fold(anyio.run(store.read, "s"))
    assert state.finished is not None and state.finished.output == "end"
    assert sum(m.role == "tool" for m in state.messages) == 1
