"""Who goes first: a policy is one small class that ranks sequences. Imports no jax.

The sequence with the smallest rank is scheduled first and preempted last. `served` is told what a
sequence was given, so that a policy can keep accounts.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

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


_PROGRAMS = 10_000  # that are remembered
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


class LeastAttained(FirstCome):
    """The program that was given the least so far first: all calls of one agent's run together.

    A run of few calls so overtakes one of many, and its length need not be known (Autellix, arXiv
    2502.13965). What a program was given counts in levels, each twice the one before, of which the
    first ends at `quantum` tokens; within a level calls go by arrival, as do calls of no program. A
    call that waits while others are given `patience` tokens goes before all that came later: nobody
    starves, and what is lost to it is bounded by that.
    """

    def __init__(self, quantum: int = 256, patience: int = 32768) -> None:
        self._quantum, self._patience = quantum, patience
        self._given: OrderedDict[str, int] = OrderedDict()  # by program, the last used last
        self._since: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()  # of waiting, in tokens
        self._total = 0

    def rank(self, sequence: Sequence) -> Any:
        waited = self._total - self._since.setdefault(sequence, self._total)
        given = self._given.get(sequence.request.program, 0)
        level = 0 if waited >= self._patience else 1 + (given // self._quantum).bit_length()
        return level, sequence.number

    def served(self, sequence: Sequence, tokens: int) -> None:
        self._total += tokens
        self._since[sequence] = self._total
        program = sequence.request.program
        if program:
            self._given[program] = self._given.get(program, 0) + tokens
            self._given.move_to_end(program)
            if len(self._given) > _PROGRAMS:
                self._given.popitem(last=False)
