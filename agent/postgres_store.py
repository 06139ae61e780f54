"""The journal in a PostgreSQL database, for agents on several machines.

    store = PostgresStore("postgresql://user@host/database")        # pip install jaxinfra[postgres]

Flushed before an append returns, where the server's `synchronous_commit` is on, as it is by
default. Two processes that append to one session take turns by an advisory lock on its name, so
the second sees what the first wrote and is told of the conflict. A deleted session's rows are gone
for every query at once; their bytes go when the server vacuums.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from agent.sql_store import SQLStore
from jaxinfra.errors import UserError

if TYPE_CHECKING:
    import psycopg

_SCHEMA = """
CREATE TABLE IF NOT EXISTS event (
  session TEXT NOT NULL, seq BIGINT NOT NULL, time DOUBLE PRECISION NOT NULL,
  line TEXT NOT NULL, checksum BIGINT NOT NULL,
  PRIMARY KEY (session, seq)
)"""
_ALONE = "SELECT pg_advisory_xact_lock(%s)"
_MAKING = 0x6A6F75726E616C  # the lock under which the table is made


class PostgresStore(SQLStore):
    """A store in the table `event` of the database at `address` (a connection string or URL). See
    `agent.journal.Store`. A lost connection fails the call that was under way, whose caller reads
    the journal to see how it ended; the next call opens another.

    Raises UserError where psycopg is missing or the server does not let us in.
    """

    begin, place = "BEGIN", "%s"

    def __init__(self, address: str):
        try:
            import psycopg
            from psycopg.conninfo import conninfo_to_dict
        except ImportError:
            raise UserError("PostgresStore: pip install 'jaxinfra[postgres]'") from None
        self._psycopg: Any = psycopg
        self._address = address
        try:
            told = conninfo_to_dict(address)
        except psycopg.Error:  # its message holds the address, which may hold a password
            raise UserError("PostgresStore: the address is no connection string") from None
        super().__init__(f"postgresql://{told.get('host', '')}/{told.get('dbname', '')}")
        with self._told():
            db = self._connection()
            with self._transaction(db):
                db.execute(_ALONE, (_MAKING,))
                db.execute(_SCHEMA)

    def _connection(self) -> psycopg.Connection:
        if self._db is None or self._db.closed:
            self._db = self._psycopg.connect(self._address, autocommit=True)
        return self._db

    def _hold(self, db: psycopg.Connection, sessions: list[str]) -> None:
        for session in sessions:  # always in the same order, or two batches wait for each other
            db.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (session,))

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except self._psycopg.Error as error:
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UserError(f"{self.name}: {first[0]}; is the server up, and lets us in?") from None
