"""Long-term memory: what is to be known of one user, in one SQLite file of that user alone.

A search ranks by words (FTS5, BM25) and by meaning (vectors), joins the two ranks (reciprocal rank
fusion: Cormack et al., SIGIR 2009), and weighs what it found by recency and importance (Park et
al., 2023, arXiv:2304.03442). O(n d) a search, as vectors are compared with all of the user's.

Every fact says where it is from, and whether a stranger may have written it. A fact that follows
from others is deleted with any of them. A deleted fact's bytes are overwritten in the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from agent.memory.embed import Embedder, Ngrams
from jaxinfra.errors import UserError

Kind = Literal["fact", "episode", "procedure"]
_SCHEMA = """
CREATE TABLE IF NOT EXISTS fact (
  id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, key TEXT, text TEXT NOT NULL,
  source TEXT NOT NULL, origin TEXT UNIQUE, tainted INTEGER NOT NULL, importance REAL NOT NULL,
  created REAL NOT NULL, ended REAL, used REAL NOT NULL, uses INTEGER NOT NULL DEFAULT 0,
  vector BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS derived (
  child INTEGER NOT NULL REFERENCES fact ON DELETE CASCADE, parent INTEGER NOT NULL,
  PRIMARY KEY (child, parent)
);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(
  text, content='fact', content_rowid='id', tokenize='porter unicode61'
);
"""
_DELETE = """
DELETE FROM fact WHERE id IN (
  WITH RECURSIVE doomed(id) AS (
    SELECT value FROM json_each(?)
    UNION SELECT child FROM derived JOIN doomed ON parent = doomed.id
  ) SELECT id FROM doomed)"""
_FUSION = 60  # the constant of reciprocal rank fusion
_HALF_LIFE = 30 * 86400.0  # seconds after which an unused fact counts half


@dataclass(frozen=True)
class Fact:
    """Something remembered. `source` says where from; it held from `created` until `ended` (None:
    it still does), in seconds since 1970. `tainted`: a stranger may have written it."""

    id: int
    kind: Kind
    key: str | None
    text: str
    source: str
    tainted: bool
    importance: float
    created: float
    ended: float | None
    uses: int


class Memories:
    """The memory in the file `path`. Safe to share between threads and processes."""

    def __init__(
        self, path: str | Path, embed: Embedder | None = None,
        clock: Callable[[], float] = time.time,
    ):  # fmt: skip
        self.path = Path(path)
        self._embed = embed or Ngrams()
        self._clock = clock
        self._alone = threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, timeout=30.0, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        try:
            for pragma in ("journal_mode=WAL", "secure_delete=ON", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(f"{self.path}: {error}; give another file for the memory") from None

    @classmethod
    def of_user(cls, folder: str | Path, user: str, embed: Embedder | None = None) -> Memories:
        """The memory of one user. Users are files, so no query can reach another's."""
        name = hashlib.sha256(user.encode()).hexdigest()[:32]
        return cls(Path(folder) / f"{name}.memory", embed)

    def close(self) -> None:
        with self._alone:
            self._db.close()

    def add(
        self, text: str, *, source: str, kind: Kind = "fact", key: str | None = None,
        importance: float = 0.5, tainted: bool = False, origin: str | None = None,
        parents: Sequence[int] = (),
    ) -> Fact:  # fmt: skip
        """Remembers `text`. A `key` has one value at a time: the one before ends. The same `origin`
        twice is one fact. Raises UserError for an empty text or an importance beyond 0 to 1."""
        if not text.strip() or not 0 <= importance <= 1:
            raise UserError(f"memory: {text[:40]!r}, {importance=}: give a text, and 0 to 1")
        vector = self._embed([text])[0].astype("<f4").tobytes()
        with self._alone, self._db as db:
            if origin is not None and (known := self._where("origin = ?", origin)):
                return known[0]
            now = self._clock()
            if key is not None:
                db.execute("UPDATE fact SET ended = ? WHERE key = ? AND ended IS NULL", (now, key))
            row = db.execute(
                "INSERT INTO fact (kind, key, text, source, origin, tainted, importance, created,"
                " used, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (kind, key, text, source, origin, tainted, importance, now, now, vector),
            )
            db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (row.lastrowid, text))
            db.executemany(
                "INSERT INTO derived VALUES (?, ?)", [(row.lastrowid, parent) for parent in parents]
            )
            return self._where("id = ?", row.lastrowid)[0]

    def all(self, *, kind: Kind | None = None, ended: bool = False) -> list[Fact]:
        """What is remembered, the oldest first; with `ended` also what no longer holds."""
        where = "(? IS NULL OR kind = ?)" + ("" if ended else " AND ended IS NULL")
        return self._where(where, kind, kind)

    def value(self, key: str, at: float | None = None) -> Fact | None:
        """The fact that `key` has, or had at the time `at`."""
        when = self._clock() if at is None else at
        where = "key = ? AND created <= ? AND (ended IS NULL OR ended > ?)"
        return next(reversed(self._where(where, key, when, when)), None)

    def search(self, query: str, *, most: int = 5, kind: Kind | None = None) -> list[Fact]:
        """The facts that hold and fit the query, best first; what is found counts as used."""
        wanted = self._embed([query])[0]
        with self._alone, self._db as db:
            rows = {row["id"]: row for row in db.execute(
                "SELECT * FROM fact WHERE ended IS NULL AND (? IS NULL OR kind = ?) ORDER BY id",
                (kind, kind),
            )}  # fmt: skip
            near = {id: float(_vector(row) @ wanted) for id, row in rows.items()}
            by_meaning = sorted((id for id in rows if near[id] > 0.1), key=lambda id: -near[id])
            by_words = [id for id in self._by_words(query) if id in rows]
            relevance: defaultdict[int, float] = defaultdict(float)
            for ranked in (by_meaning[:50], by_words[:50]):
                for place, id in enumerate(ranked):
                    relevance[id] += (_FUSION + 1) / (_FUSION + 1 + place)
            now = self._clock()
            score = {id: share * _worth(rows[id], now) for id, share in relevance.items()}
            best = sorted(score, key=lambda id: (-score[id], id))[:most]
            use = "UPDATE fact SET used = ?, uses = uses + 1 WHERE id = ?"
            db.executemany(use, [(now, id) for id in best])
        return [_fact(rows[id]) for id in best]

    def delete(self, ids: Sequence[int]) -> int:
        """Deletes facts and all that follows from them, for good; returns how many went."""
        if not ids:
            return 0
        with self._alone:
            with self._db as db:
                gone = db.execute(_DELETE, (json.dumps([*ids]),)).rowcount
                # Words of a deleted text stay in an index that is only marked: make it anew.
                db.execute("INSERT INTO words (words) VALUES ('rebuild')")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return gone

    def forget(self, most: int) -> int:
        """Keeps the `most` facts that are worth most by importance, use and recency, and deletes
        the others; returns how many went. Of a key's values those that ended go first."""
        with self._alone:
            now = self._clock()
            ranked = sorted(self._db.execute("SELECT * FROM fact").fetchall(), key=lambda row: (
                row["ended"] is None, _worth(row, now) * (1 + row["uses"]) ** 0.5, row["id"]
            ))  # fmt: skip
            return self.delete([row["id"] for row in ranked[: max(0, len(ranked) - most)]])

    def consolidate(self, near: float = 0.9) -> int:
        """Joins facts that say nearly the same (cosine at least `near`): the newest stays, as
        important as the most important and as tainted as any; returns how many went."""
        with self._alone:
            rows = self._db.execute(
                "SELECT * FROM fact WHERE ended IS NULL AND key IS NULL AND kind = 'fact'"
                " ORDER BY id DESC"
            ).fetchall()
            kept: list[sqlite3.Row] = []
            gone: list[int] = []
            with self._db as db:
                for row in rows:
                    vector = _vector(row)
                    twin = next((k for k in kept if float(_vector(k) @ vector) >= near), None)
                    if twin is None:
                        kept.append(row)
                        continue
                    gone.append(row["id"])
                    db.execute(
                        "UPDATE fact SET importance = max(importance, ?), tainted = max(tainted, ?)"
                        " WHERE id = ?", (row["importance"], row["tainted"], twin["id"]),
                    )  # fmt: skip
            return self.delete(gone)

    def _by_words(self, query: str) -> list[int]:
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query))
        find = "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words), rowid"
        return [row[0] for row in self._db.execute(find, (words,))] if words else []

    def _where(self, where: str, *values: object) -> list[Fact]:
        with self._alone:
            rows = self._db.execute(f"SELECT * FROM fact WHERE {where} ORDER BY id", values)
            return [_fact(row) for row in rows]


def _fact(row: sqlite3.Row) -> Fact:
    known = {field.name: row[field.name] for field in fields(Fact)}
    return Fact(**{**known, "tainted": bool(row["tainted"])})


def _vector(row: sqlite3.Row) -> np.ndarray:
    return np.frombuffer(row["vector"], "<f4")


def _worth(row: sqlite3.Row, now: float) -> float:
    return (0.5 + row["importance"]) * 0.5 ** (max(0.0, now - row["used"]) / _HALF_LIFE)
