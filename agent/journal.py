"""Where events are kept: the protocol of a store, and one in memory.

A store appends and reads; it knows nothing of what events mean. `append` says after which event the
new ones come, so two processes that drive the same session cannot both go on: the second is told.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.events import Forked, Kept, Recorded
from jaxinfra.errors import UserError


class Conflict(Exception):
    """Another process appended to this session; whoever sees this must stop driving it."""


@dataclass(frozen=True)
class SessionInfo:
    """One line of the session list; times in seconds since 1970."""

    session: str
    events: int
    began: float
    last: float


class Store(Protocol):
    """An append-only journal of sessions. `tests/agent/test_stores.py` says what it must do."""

    async def append(self, session: str, after: int, events: Sequence[Kept]) -> list[Recorded]:
        """Keeps all of `events` or none, as numbers after+1, after+2, ...; they survive a crash
        once this returns. Raises Conflict where the session does not end at `after`."""
        ...

    async def read(self, session: str, until: int | None = None) -> list[Recorded]:
        """The events up to number `until`, in order; none for a session nobody began."""
        ...

    async def sessions(self) -> list[SessionInfo]:
        """All sessions, the latest first."""
        ...

    async def delete(self, session: str) -> None:
        """Forgets a session for good."""
        ...


class MemoryStore:
    """A store that lives as long as its process."""

    def __init__(self) -> None:
        self._journal: dict[str, list[Recorded]] = {}

    async def append(self, session: str, after: int, events: Sequence[Kept]) -> list[Recorded]:
        journal = self._journal.get(session, [])
        if len(journal) != after:
            raise Conflict(f"session {session}: it has {len(journal)} events, not {after}")
        now = time.time()
        recorded = [Recorded(after + i, now, event) for i, event in enumerate(events, 1)]
        if recorded:
            self._journal[session] = journal + recorded
        return recorded

    async def read(self, session: str, until: int | None = None) -> list[Recorded]:
        return self._journal.get(session, [])[:until]

    async def sessions(self) -> list[SessionInfo]:
        return sorted(
            (SessionInfo(s, len(j), j[0].time, j[-1].time) for s, j in self._journal.items()),
            key=lambda info: (-info.last, info.session),
        )

    async def delete(self, session: str) -> None:
        self._journal.pop(session, None)


async def fork(store: Store, session: str, new: str, *, at: int | None = None) -> int:
    """Begins the session `new` as a copy of the first `at` events of `session` (all by default);
    returns how many events it has. What ran in the parent does not run again; what the parent had
    begun at that point is in doubt in the child, as after a crash."""
    past = await store.read(session, until=at)
    if not past or at not in (None, len(past)):
        raise UserError(f"fork {session}: at={at}, but it has {len(past)} events")
    copied = [recorded.event for recorded in past]
    try:
        return len(await store.append(new, 0, [*copied, Forked(session, len(past))]))
    except Conflict:
        raise UserError(f"fork {session}: there is a session {new}; choose another name") from None
