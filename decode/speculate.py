"""Guessing what comes next, and whether it pays. Imports no jax.

Who guesses: prompt lookup (Saxena, 2023), for which the last few tokens of a sequence are looked
for earlier in it, and what followed there is drafted; or a model (`decode.draft`), whose drafts the
host never sees before they are judged. The step computes the drafts beside the sequence's last
token and draws at each place; a draft stands as long as it is what was drawn. So greedy text and
the distribution of what is drawn are the model's.

A draft costs a longer step. How much longer, and how many tokens it brings, is measured for each
number of running sequences; where drafting made fewer tokens a second, it rests, and is tried again
from time to time, ever more seldom as trials fail. What a draft model reads to catch up is time of
drafting.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Many
from weakref import WeakKeyDictionary

from decode.scheduler import Chunk, Sequence

_LONGEST, _SHORTEST = 4, 2  # tokens that are looked for
_TRIAL = 8  # steps with drafts before it is judged
_REST, _LONG_REST = 64, 1024  # steps without before another trial: at first, and at most
_CALLS = 4  # of a draft model that catches up, before a step: others wait for no more
_KEEP = 0.9  # of an average at each step


class Guesses:
    """Drafts for one engine, from what was said before."""

    def __init__(self, most: int) -> None:
        """`most`: tokens a draft; 0 drafts nothing."""
        self.most = most
        self.drafted = self.accepted = 0
        self._made: dict[tuple[int, bool], tuple[float, float]] = {}  # tokens, seconds
        self._steps: dict[tuple[int, bool], int] = defaultdict(int)
        self._rests, self._since, self._owed = _REST, 0, 0.0
        self._seen: WeakKeyDictionary[Sequence, _Seen] = WeakKeyDictionary()

    def after(self, sequence: Sequence) -> Many[int]:
        """What may follow `sequence`; nothing where its last tokens are new."""
        seen = self._seen.setdefault(sequence, _Seen())
        at = seen.find(sequence.tokens)
        return () if at is None else tuple(sequence.tokens[at : at + self.most])

    def judge(self, drafts: Many[int], drawn: list[int]) -> int:
        """How many of a chunk's drafts stand beside what was `drawn`."""
        right = 0
        while right < len(drawn) - 1 and drafts[right] == drawn[right]:
            right += 1
        self.drafted += len(drafts)
        self.accepted += right
        return right

    def pay(self, running: int) -> bool:
        """Whether the next step should draft, with so many that run."""
        if not self.most or not running:
            return False
        if self._steps[running, False] < _TRIAL:
            return False
        if self._steps[running, True] < _TRIAL or self._since >= self._rests:
            return True
        return self._speed(running, True) >= self._speed(running, False)

    def owe(self, seconds: float) -> None:
        """Time that was spent so that a later step can draft."""
        self._owed += seconds

    def catch_up(
        self, running: Many[Sequence], budget: int, compute: Callable[[list[Chunk]], None]
    ) -> bool:
        """Whether the next step can draft."""
        return True

    def stood(self, chunk: Chunk, made: int) -> None:
        """So many tokens came of the chunk, whose sequence has them by now."""

    def measured(self, running: int, drafted: bool, tokens: int, seconds: float) -> None:
        """A step of so many rows made so many tokens in so many seconds."""
        key = (running, drafted)
        self._steps[key] += 1
        self._since += 1
        if drafted:
            seconds, self._owed = seconds + self._owed, 0.0
        tokens_, seconds_ = self._made.get(key, (tokens, seconds))
        self._made[key] = (_KEEP * tokens_ + (1 - _KEEP) * tokens,
                           _KEEP * seconds_ + (1 - _KEEP) * seconds)  # fmt: skip
        if drafted:
            pays = self._speed(running, True) >= self._speed(running, False)
            new = pays or self._steps[key] <= _TRIAL
            self._rests, self._since = _REST if new else min(2 * self._rests, _LONG_REST), 0

    def _speed(self, running: int, drafted: bool) -> float:
        tokens, seconds = self._made.get((running, drafted), (0.0, 1.0))
        return tokens / max(seconds, 1e-9)


class ByModel(Guesses):
    """Drafts that a model makes on the device, and how far it has read each sequence.

    Pages that it has read to their end are known as such by the pool, so that one who takes them
    from the prefix cache need not read them again.
    """

    def __init__(self, most: int, *, separate: bool) -> None:
        """separate: whether the model has pages of its own, and so must read."""
        super().__init__(most)
        self._separate = separate

    def after(self, sequence: Sequence) -> Many[int]:
        """Places for as many drafts as there can be."""
        return (0,) * self.most

    def catch_up(
        self, running: Many[Sequence], budget: int, compute: Callable[[list[Chunk]], None]
    ) -> bool:
        """Whether the next step can draft, after the model has read for a few calls.

        compute: has it read chunks, of `budget` tokens at most, and waits for it.
        """
        start = time.perf_counter()
        for _ in range(_CALLS):
            if not (chunks := self._behind(running, budget)):
                return True
            compute(chunks)
            for chunk in chunks:
                self._has_read(chunk.sequence, chunk.end)
            now = time.perf_counter()
            self.owe(now - start)
            start = now
        return not self._behind(running, budget)

    def stood(self, chunk: Chunk, made: int) -> None:
        """See Guesses: the last guess of a turn has not been read."""
        if self._separate and chunk.drafts and not chunk.stale and chunk.sequence.slot >= 0:
            self._has_read(chunk.sequence, chunk.start + min(made, len(chunk.drafts)))

    def _behind(self, running: Many[Sequence], budget: int) -> list[Chunk]:
        """What is to be read; a turn itself reads the last token and the one before."""
        chunks: list[Chunk] = []
        for sequence in running if self._separate else ():
            if not sequence.drafts:
                continue
            start, end = self._read(sequence), sequence.table.length
            count = min(end - start, budget)
            if end - start > 1 and count > 0:
                chunks.append(Chunk(sequence, start, count, 0, (), sequence.cuts))
                budget -= count
        return chunks

    def _has_read(self, sequence: Sequence, end: int) -> None:
        size = sequence.table.pool.size
        for page in sequence.table.pages[sequence.read // size : end // size]:
            sequence.table.pool.read[page] = True
        sequence.read = end

    def _read(self, sequence: Sequence) -> int:
        table, size = sequence.table, sequence.table.pool.size
        at = sequence.read // size
        while (at + 1) * size <= table.length and table.pool.read[table.pages[at]]:
            at += 1
        sequence.read = max(sequence.read, at * size)
        return sequence.read


class _Seen:
    """Where each run of a few tokens stood last, for one sequence."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._read = 0

    def find(self, tokens: list[int]) -> int | None:
        """Where the longest known run that `tokens` end with went on, the last time before."""
        for end in range(max(self._read, _SHORTEST), len(tokens)):
            for length in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._after[tuple(tokens[end - length : end])] = end
        self._read = len(tokens)
        for length in range(min(_LONGEST, len(tokens)), _SHORTEST - 1, -1):
            if (at := self._after.get(tuple(tokens[-length:]))) is not None:
                return at
        return None
