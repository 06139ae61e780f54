"""Prefixes that were computed once: a tree of pages by the tokens in them. Imports no jax.

A node is one full page; the path to it spells the tokens before. Sequences that begin alike take
those pages instead of computing them. The cache holds every page in it once; a page that only the
cache holds can be taken back, leaves first, the one used longest ago first (RadixAttention, arXiv
2312.07104, by whole pages). A lease says when a prefix will be wanted again: such pages go last,
the one that is wanted last first, as an oracle would choose (Belady, 1966); of those that are late,
the latest. So no lease keeps anybody from running. Prefixes under different salts never meet.

Cost: `match` and `insert` hash each page's tokens once; `evict` looks at each page once, and so
frees a 64th of them where it was asked for less.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from decode.pages import Pages


@dataclass(eq=False)
class Node:
    """A page of a prefix."""

    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    used: int = 0  # when a match or an insert last went through it
    leases: dict[int, float] = field(default_factory=dict)  # when it is wanted, by lease
    salt: str = ""  # of a root
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


class PrefixCache:
    """The pages of finished or running sequences, by their tokens."""

    def __init__(self, pool: Pages) -> None:
        self._pool = pool
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._leased: dict[int, Node] = {}
        self._next_lease = 0
        self.pages = 0  # that the cache holds
        self.epoch = 0  # times that it was emptied

    def match(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        """Pages of the longest known prefix, whole pages only; they are now held by the caller too.

        The last token is never matched: something must be computed to foretell the next one.
        """
        path = self._path(tokens[: len(tokens) - 1], salt)
        pages = [node.page for node in path]
        self._pool.share(pages)
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> None:
        """Keeps the full pages of a sequence; where a prefix is known already, the pages it has."""
        if len(tokens) < self._pool.size:
            return
        node = self._roots.setdefault(salt, Node((), -1, None, salt=salt))
        self._clock += 1
        for chunk, page in zip(self._chunks(tokens), pages, strict=False):
            child = node.children.get(chunk)
            if child is None:
                child = node.children[chunk] = Node(chunk, page, node)
                self._pool.share([page])
                self.pages += 1
            child.used = self._clock
            node = child

    def lease(self, tokens: Sequence[int], wanted: float, salt: str = "") -> int | None:
        """Tells when the known prefix of `tokens` is wanted; None if nothing of it is known."""
        path = self._path(tokens, salt)
        if not path:
            return None
        self._next_lease += 1
        path[-1].leases[self._next_lease] = wanted
        self._leased[self._next_lease] = path[-1]
        return self._next_lease

    def give_up(self, lease: int) -> None:
        """Ends a lease; one that has ended is none."""
        node = self._leased.pop(lease, None)
        if node is not None:
            del node.leases[lease]

    @property
    def evictable(self) -> int:
        """Pages that only the cache holds."""
        return sum(self._pool.holders[node.page] == 1 for node in self._nodes())

    def clear(self) -> None:
        """Forgets every prefix, leased or not."""
        self._pool.release([node.page for node in self._nodes()])
        self._roots, self._leased, self.pages = {}, {}, 0
        self.epoch += 1

    def evict(self, count: int, now: float) -> int:
        """Frees pages that only the cache holds, `count` or a 64th of all that it has; returns how
        many: fewer where fewer can go."""
        count = max(count, self.pages // 64)
        leaves = [
            (self._worth(node, now), i, node) for i, node in enumerate(self._nodes())
            if self._can_go(node)
        ]  # fmt: skip
        heapq.heapify(leaves)
        freed = 0
        while freed < count and leaves:
            _, order, leaf = heapq.heappop(leaves)
            parent = leaf.parent
            assert parent is not None
            del parent.children[leaf.tokens]
            self._pool.release([leaf.page])
            self.pages -= 1
            freed += 1
            self._move_leases(leaf, parent)
            if parent.parent is not None and self._can_go(parent):
                heapq.heappush(leaves, (self._worth(parent, now), order, parent))
            elif parent.parent is None and not parent.children:
                del self._roots[parent.salt]
        return freed

    def _worth(self, node: Node, now: float) -> tuple[float, int]:
        """What goes first is worth least: no lease; then a lease on what is wanted in long, or was
        long ago, as who is late tends to be so for as long again."""
        soonest = min((abs(wanted - now) for wanted in node.leases.values()), default=math.inf)
        return -soonest, node.used

    def _move_leases(self, gone: Node, to: Node) -> None:
        """What is left of a prefix is wanted when the whole was."""
        for lease, wanted in gone.leases.items():
            if to.parent is None:
                del self._leased[lease]
            else:
                to.leases[lease], self._leased[lease] = wanted, to

    def _can_go(self, node: Node) -> bool:
        return not node.children and self._pool.holders[node.page] == 1

    def _path(self, tokens: Sequence[int], salt: str) -> list[Node]:
        node, path = self._roots.get(salt), []
        self._clock += 1
        for chunk in self._chunks(tokens):
            node = node and node.children.get(chunk)
            if node is None:
                break
            node.used = self._clock
            path.append(node)
        return path

    def _chunks(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self._pool.size
        for start in range(0, len(tokens) - size + 1, size):
            yield tuple(tokens[start : start + size])

    def _nodes(self) -> Iterator[Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()
