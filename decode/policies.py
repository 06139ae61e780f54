"""Who goes first: a policy is one small class that ranks sequences. Imports no jax.

The sequence with the smallest rank is scheduled first and preempted last. `served` is told what a
sequence was given, so that a policy can keep accounts.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from decode.scheduler import Sequence


class Policy(Protocol):
    """Ranks sequences."""

    def rank(self, sequence: Sequence) -> Any:
        """What sequences are sorted by."""
        ...

    def served(self, sequence: Sequence, tokens: int) -> None:
        """`sequence` was given `tokens` of a step."""
        ...


class FirstCome:
    """In the order of arrival."""

    def rank(self, sequence: Sequence) -> Any:
        return sequence.number

    def served(self, sequence: Sequence, tokens: int) -> None:
        pass


class Priority(FirstCome):
    """By the request's priority, the lower first, and then by arrival."""

    def rank(self, sequence: Sequence) -> Any:
        return sequence.request.priority, sequence.number


class ShortestRemaining(FirstCome):
    """Who may still take the fewest tokens first; a long one may wait for ever."""

    def rank(self, sequence: Sequence) -> Any:
        left = sequence.request.params.max_tokens - sequence.made
        return left + len(sequence.tokens) - sequence.table.length, sequence.number


_REMEMBERED = 1000  # chunks of others after which a tenant counts as one that comes anew


class Fair(FirstCome):
    """The tenant that was given the fewest tokens first.

    One that comes, or comes back, begins at the least of those that are there, so it neither waits
    for what others had before nor lives on what it did not take.
    """

    def __init__(self) -> None:
        self._given: dict[str, float] = defaultdict(float)
        self._last: dict[str, int] = {}
        self._turn = 0

    def rank(self, sequence: Sequence) -> Any:
        return self._given[sequence.request.tenant], sequence.number

    def served(self, sequence: Sequence, tokens: int) -> None:
        tenant = sequence.request.tenant
        self._turn += 1
        for gone in [x for x, turn in self._last.items() if self._turn - turn >= _REMEMBERED]:
            del self._last[gone], self._given[gone]
        if tenant not in self._last and self._last:
            self._given[tenant] = min(self._given[x] for x in self._last)
        self._given[tenant] += tokens
        self._last[tenant] = self._turn
