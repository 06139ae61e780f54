"""What a journal in a database is, whatever the database: append-only rows with checksums.

Appends that arrive while one is being flushed are committed together (group commit), so a flush is
shared by all sessions that wait for it. Each event carries a checksum: a damaged one is named, and
what precedes it can still be forked. `agent.sqlite_store` and `agent.postgres_store` say how their
database is opened, locked and spoken to.
"""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import anyio
import anyio.to_thread
from pydantic import ValidationError

from agent.events import Kept, Recorded, dump, load
from agent.journal import Conflict, SessionInfo
from jaxinfra.errors import UserError

T = TypeVar("T")


@dataclass(eq=False)
class _Append:
    session: str
    after: int
    events: Sequence[Kept]
    lines: Sequence[str]
    recorded: list[Recorded] | None = None
    error: BaseException | None = None


class SQLStore(ABC):
    """A store in the table `event` of a database. See `agent.journal.Store`."""

    begin: ClassVar[str]  # how a transaction that writes begins
    place: ClassVar[str]  # what stands for a value in a query

    def __init__(self, name: str):
        """`name` is what errors call it."""
        self.name = name
        self._db: Any = None
        self._turn = anyio.Lock(fast_acquire=True)
        self._alone = threading.Lock()
        self._waiting: list[_Append] = []

    def _connection(self) -> Any:
        """The open connection, outside of any transaction."""
        return self._db

    @abstractmethod
    def _told(self) -> AbstractContextManager[None]:
        """Turns the database's errors into UserError."""

    def _hold(self, db: Any, sessions: list[str]) -> None:  # noqa: B027
        """Keeps others from writing to these sessions until the transaction ends."""

    def _erased(self, db: Any) -> None:  # noqa: B027
        """What is to be done after a deletion has been committed."""

    def close(self) -> None:
        with self._alone:
            self._db.close()

    async def append(self, session: str, after: int, events: Sequence[Kept]) -> list[Recorded]:
        item = _Append(session, after, events, [dump(event) for event in events])
        self._waiting.append(item)
        with anyio.CancelScope(shield=True):
            async with self._turn:
                if item in self._waiting:  # else whoever had the turn before has committed it too
                    batch, self._waiting = self._waiting, []
                    await anyio.to_thread.run_sync(self._commit, batch)
        if item.recorded is None:
            raise item.error or AssertionError("it was committed")
        return item.recorded

    async def read(self, session: str, until: int | None = None) -> list[Recorded]:
        query = (
            "SELECT seq, time, line, checksum FROM event WHERE session = ? AND seq <= ? "
            "ORDER BY seq"
        )
        last = 2**62 if until is None else until
        rows = await self._in_thread(lambda db: self._rows(db, query, session, last))
        return [self._checked(session, n, row) for n, row in enumerate(rows, 1)]

    async def sessions(self) -> list[SessionInfo]:
        query = "SELECT session, count(*), min(time), max(time) FROM event GROUP BY session"
        rows = await self._in_thread(lambda db: self._rows(db, query))
        found = [SessionInfo(*row) for row in rows]
        return sorted(found, key=lambda info: (-info.last, info.session))

    async def delete(self, session: str) -> None:

        def erase(db: Any) -> None:
            with self._transaction(db):
                self._hold(db, [session])
                db.execute(f"DELETE FROM event WHERE session = {self.place}", (session,))
            self._erased(db)

        await self._in_thread(erase)

    def _rows(self, db: Any, query: str, *values: Any) -> list[Any]:
        return db.execute(query.replace("?", self.place), values).fetchall()

    async def _in_thread(self, ask: Callable[[Any], T]) -> T:
        def locked() -> T:
            with self._told(), self._alone:
                return ask(self._connection())

        return await anyio.to_thread.run_sync(locked)

    @contextlib.contextmanager
    def _transaction(self, db: Any):
        db.execute(self.begin)
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(Exception):  # the connection may be what failed
                db.execute("ROLLBACK")
            raise

    def _checked(self, session: str, expected: int, row: tuple[int, float, str, int]) -> Recorded:
        seq, at, line, checksum = row
        try:
            if seq == expected and zlib.crc32(line.encode()) == checksum:
                return Recorded(seq, at, load(line))
        except (ValidationError, AttributeError, UnicodeError):
            pass
        raise UserError(
            f"{self.name}: event {expected} of session {session} is damaged; "
            f"fork it at {expected - 1} to go on from what precedes"
        )

    def _commit(self, batch: list[_Append]) -> None:
        try:
            with self._told(), self._alone:
                db = self._connection()
                with self._transaction(db):
                    self._hold(db, sorted({item.session for item in batch}))
                    for item in batch:
                        self._insert(db, item)
        except BaseException as error:
            for item in batch:
                item.recorded, item.error = None, item.error or error

    def _insert(self, db: Any, item: _Append) -> None:
        query = "SELECT coalesce(max(seq), 0) FROM event WHERE session = ?"
        ((last,),) = self._rows(db, query, item.session)
        if last != item.after:
            item.error = Conflict(f"session {item.session}: it has {last} events, not {item.after}")
            return
        now = time.time()
        insert = "INSERT INTO event VALUES (?, ?, ?, ?, ?)".replace("?", self.place)
        db.cursor().executemany(insert, [
            (item.session, item.after + i, now, line, zlib.crc32(line.encode()))
            for i, line in enumerate(item.lines, 1)
        ])  # fmt: skip
        item.recorded = [
            Recorded(item.after + i, now, event) for i, event in enumerate(item.events, 1)
        ]


def open_store(address: str, *, existing: bool = False) -> SQLStore:
    """The journal at a PostgreSQL URL, else in the SQLite file of that name; raises UserError where
    it is to be `existing` and is no file, as opening one would make it."""
    if address.startswith(("postgresql://", "postgres://")):
        from agent.postgres_store import PostgresStore

        return PostgresStore(address)
    from agent.sqlite_store import SQLiteStore

    if existing and not Path(address).is_file():
        raise UserError(f"{address}: no such journal; give --journal, or run an agent first")
    return SQLiteStore(address)
