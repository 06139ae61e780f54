"""Prefixes in host memory: wanted again, but not so soon that the device should keep their pages.

What is put away is a copy of a prefix's full pages; the device's may go from then on. Before the
session's next request those that went are written into free pages and told to the prefix cache, bit
for bit. At most `room` pages are held, the ones wanted last go first.

Cost: the pages' bytes over the bus, once each way, instead of 2 FLOPs a parameter and token to
compute them again. The two programs that move pages are compiled when the first is put away.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decode.engine import Engine
    from decode.page_moves import PageMoves


@dataclass(frozen=True)
class _Stored:
    """A prefix and its pages' bytes; `epoch` is the prefix cache's, `wanted` time.monotonic()."""

    tokens: tuple[int, ...]
    salt: str
    epoch: int
    wanted: float
    count: int
    held: Any


class HostPages:
    """Prefixes of `engine`, by key. For the thread that owns the engine, between two steps."""

    def __init__(self, engine: Engine, room: int) -> None:
        self.pages = self.restored = 0  # held now, and written back so far
        self._engine, self._room = engine, room
        self._stored: dict[str, _Stored] = {}

    @functools.cached_property
    def _moves(self) -> PageMoves:
        from decode.page_moves import PageMoves

        return PageMoves(self._engine._runner)

    def keep(self, key: str, tokens: tuple[int, ...], salt: str, wanted: float) -> None:
        """Copies what the prefix cache has of `tokens`."""
        self.drop(key)
        cache, pool = self._engine.cache, self._engine.pool
        if cache is None or self._room < 1:
            return
        pages = cache.match((*tokens, 0), salt)
        if 0 < len(pages) <= self._room:
            stored = _Stored(tokens[: len(pages) * pool.size], salt, cache.epoch, wanted,
                             len(pages), self._moves.out(pages))  # fmt: skip
            self._stored[key] = stored
            self.pages += len(pages)
        pool.release(pages)
        while self.pages > self._room:
            self.drop(max(self._stored, key=lambda key: self._stored[key].wanted))

    def bring_back(self, key: str) -> None:
        """Writes back what the prefix cache no longer has, as far as pages can be had."""
        stored, cache, pool = self._stored.get(key), self._engine.cache, self._engine.pool
        self.drop(key)
        if stored is None or cache is None or stored.epoch != cache.epoch:
            return
        have = cache.match((*stored.tokens, 0), stored.salt)
        missing = stored.count - len(have)
        if missing > pool.free:
            cache.evict(missing - pool.free, time.monotonic())
        new = pool.take(min(missing, pool.free))
        if new:
            pages = [*have, *new]
            self._moves.into(new, stored.held, start=len(have))
            cache.insert(stored.tokens[: len(pages) * pool.size], pages, stored.salt)
            self.restored += len(new)
        pool.release([*have, *new])

    def drop(self, key: str) -> None:
        stored = self._stored.pop(key, None)
        self.pages -= stored.count if stored else 0
