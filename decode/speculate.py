"""Guessing what comes next from what was said before, and whether it pays. Imports no jax.

Prompt lookup (Saxena, 2023): the last few tokens of a sequence are looked for earlier in it, and
what followed there is drafted. The step computes the drafts beside the sequence's last token and
draws at each place with the number that belongs to that position; a draft stands as long as it is
what was drawn. So an answer is the same with and without drafts, greedy or not, and its
distribution is the model's: the chance that a draft stands is the model's chance of it.

A draft costs a longer step. How much longer, and how many tokens it brings, is measured for each
number of running sequences; where drafting made fewer tokens a second, it rests, and is tried again
from time to time.
"""

from __future__ import annotations

from collections import defaultdict
from weakref import WeakKeyDictionary

from decode.scheduler import Chunk, Sequence

_LONGEST, _SHORTEST = 4, 2  # tokens that are looked for
_TRIAL, _REST = 8, 64  # steps with drafts before it is judged; steps without before another trial
_KEEP = 0.9  # of an average at each step


class Guesses:
    """Drafts for one engine."""

    def __init__(self, most: int) -> None:
        """`most`: tokens a draft; 0 drafts nothing."""
        self._most = most
        self.drafted = self.accepted = 0
        self._speed: dict[tuple[int, bool], float] = {}
        self._steps: dict[tuple[int, bool], int] = defaultdict(int)
        self._total = 0
        self._seen: WeakKeyDictionary[Sequence, _Seen] = WeakKeyDictionary()

    def after(self, sequence: Sequence) -> tuple[int, ...]:
        """What may follow `sequence`; nothing where its last tokens are new."""
        seen = self._seen.setdefault(sequence, _Seen())
        at = seen.find(sequence.tokens)
        return () if at is None else tuple(sequence.tokens[at : at + self._most])

    def judge(self, chunk: Chunk, drawn: list[int]) -> int:
        """How many of the chunk's drafts stand beside what was `drawn`."""
        right = 0
        while right < len(drawn) - 1 and chunk.drafts[right] == drawn[right]:
            right += 1
        self.drafted += len(chunk.drafts)
        self.accepted += right
        return right

    def pay(self, running: int) -> bool:
        """Whether the next step should draft, with so many that run."""
        if not self._most or not running:
            return False
        drafted, plain = (running, True), (running, False)
        if self._steps[plain] < _TRIAL:
            return False
        if self._steps[drafted] < _TRIAL or self._total % _REST == 0:
            return True
        return self._speed[drafted] >= self._speed[plain]

    def measured(self, running: int, drafted: bool, tokens: int, seconds: float) -> None:
        """A step of so many rows made so many tokens in so many seconds."""
        key = (running, drafted)
        self._steps[key] += 1
        self._total += 1
        speed = tokens / max(seconds, 1e-9)
        before = self._speed.get(key, speed)
        self._speed[key] = _KEEP * before + (1 - _KEEP) * speed


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
