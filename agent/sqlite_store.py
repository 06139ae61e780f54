"""The journal in one SQLite file: write-ahead, flushed before an append returns."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from agent.sql_store import SQLStore
from jaxinfra.errors import UserError

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS event (
  session TEXT NOT NULL, seq INTEGER NOT NULL, time REAL NOT NULL,
  line TEXT NOT NULL, checksum INTEGER NOT NULL,
  PRIMARY KEY (session, seq)
) WITHOUT ROWID"""


class SQLiteStore(SQLStore):
    """A store in the file `path`; any number of processes may share it. See `agent.journal.Store`.
    A deleted session's bytes are overwritten.

    Raises UserError where the file is no journal, is damaged or cannot be written.
    """

    begin, place = "BEGIN IMMEDIATE", "?"

    def __init__(self, path: str | Path):
        super().__init__(str(path))
        with self._told():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=30.0, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise UserError(f"{self.name}: a journal of version {version}; give another file")
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(_SCHEMA)
        self._db.execute(f"PRAGMA user_version={_VERSION}")

    def _erased(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.name}: {error}; give another file for the journal") from None
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror}; give another file") from None
