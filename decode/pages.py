"""The pool of key/value pages: who holds which, and when one is free again. Imports no jax.

A page holds the keys and values of `size` consecutive tokens. It may be held by several at once:
sequences that share a prefix, and the prefix cache (`decode.prefix_cache`). A holder writes only
into a page that it alone holds; `Table` copies the last page of a fork when one of the two goes on.

Cost: each operation takes time in proportion to the pages it names, whatever the pool's size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace


class OutOfPages(Exception):
    """Fewer pages are free than were asked for; nothing was taken."""


class Pages:
    """`count` pages of `size` tokens each, numbered from 0, with the number of their holders."""

    def __init__(self, count: int, size: int) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"pages: count={count}, size={size}; give 1 or more of each")
        self.size = size
        self.holders = [0] * count
        self.read = [False] * count  # a draft model has read all tokens of it
        self._free = list(range(count - 1, -1, -1))  # the last is taken next

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each now held once. Raises OutOfPages."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
            self.read[page] = False
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holds each of these pages."""
        for page in pages:
            if self.holders[page] < 1:
                raise ValueError(f"pages: page {page} is free, so it cannot be shared")
            self.holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer for each; pages without one are free."""
        for page in pages:
            if self.holders[page] < 1:
                raise ValueError(f"pages: page {page} is free already")
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._free.append(page)

    def check(self) -> None:
        """Asserts that free pages are those without a holder, each once."""
        assert sorted(self._free) == [p for p, held in enumerate(self.holders) if held == 0]


@dataclass
class Table:
    """One sequence's pages in order, and how many of its tokens they hold."""

    pool: Pages
    pages: list[int] = field(default_factory=list)
    length: int = 0

    def missing(self, tokens: int) -> int:
        """Pages that `grow(tokens)` would take."""
        size = self.pool.size
        more = -(-(self.length + tokens) // size) - len(self.pages)
        return more + self._writes_into_shared(tokens)

    def grow(self, tokens: int) -> list[tuple[int, int]]:
        """Makes room for `tokens` more; returns (source, target) of a page to copy before writing.

        Raises OutOfPages and then changes nothing.
        """
        missing = self.missing(tokens)
        taken = self.pool.take(missing) if missing else []
        copies = []
        if taken and self._writes_into_shared(tokens):
            source, self.pages[-1] = self.pages[-1], taken.pop()
            copies = [(source, self.pages[-1])]
            self.pool.release([source])
        self.pages += taken
        self.length += tokens
        return copies

    def shrink(self, length: int) -> None:
        """Forgets the tokens from `length` on; pages without a token are given back."""
        kept = -(-length // self.pool.size)
        self.pool.release(self.pages[kept:])
        del self.pages[kept:]
        self.length = length
        if length % self.pool.size:  # other tokens will end this page
            self.pool.read[self.pages[-1]] = False

    def fork(self) -> Table:
        """A sequence with the same tokens, in the same pages."""
        self.pool.share(self.pages)
        return replace(self, pages=list(self.pages))

    def close(self) -> None:
        """Gives all pages back."""
        self.pool.release(self.pages)
        self.pages, self.length = [], 0

    def slots(self, start: int, count: int) -> list[int]:
        """Where tokens from position `start` lie in the pool: page times size plus place."""
        size = self.pool.size
        return [self.pages[i // size] * size + i % size for i in range(start, start + count)]

    def _writes_into_shared(self, tokens: int) -> bool:
        part_full = self.length % self.pool.size != 0
        return bool(tokens) and part_full and self.pool.holders[self.pages[-1]] > 1
