"""A step that is under way on the device, and what each of its chunks made. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np

from decode.packing import Layout
from decode.scheduler import Chunk, Plan


@dataclass(frozen=True)
class Made:
    """What a chunk made: tokens, and of each its log-probability and the likeliest ones there.

    at: the chunk's first token among those of the step.
    """

    chunk: Chunk
    at: int
    tokens: list[int]
    logps: list[float]
    likeliest: list[dict[int, float]]


@dataclass
class Flight:
    """A step that was dispatched; `out` is a `decode.step.Out` that may not be computed yet."""

    plan: Plan
    layout: Layout
    out: Any
    drafting: bool
    dispatched: float  # time.monotonic()

    def wait(self) -> None:
        """Until it is computed."""
        np.asarray(self.out.drawn.tokens)

    def read(self, judge: Callable[[Many[int], list[int]], int]) -> list[Made]:
        """What every chunk made. judge: how many of its drafts stand beside what was drawn."""
        drafted = None if self.out.drafts is None else np.asarray(self.out.drafts)
        drawn = self.out.drawn
        tokens, logps = np.asarray(drawn.tokens).tolist(), np.asarray(drawn.logps).tolist()
        tops = None
        if any(chunk.sequence.request.params.logprobs for chunk in self.plan.chunks):
            tops = np.asarray(drawn.top_tokens), np.asarray(drawn.top_logps)
        made, at = [], 0
        for row, chunk in enumerate(self.plan.chunks):
            count = chunk.end - chunk.start
            last = at + count - 1 if self.layout.everywhere else row
            if chunk.drafts:
                places = [(0, last + i) for i in range(chunk.makes)]
                drafts = chunk.drafts if drafted is None else drafted[row].tolist()
                drafts = drafts[: len(chunk.drafts)]
                places = places[: 1 + judge(drafts, [tokens[0][at] for _, at in places])]
            else:
                places = [(step, last) for step in range(chunk.makes)]
            likeliest = [_likeliest(*tops, place) if tops else {} for place in places]
            made.append(
                Made(chunk, at, [tokens[k][s] for k, s in places],
                     [logps[k][s] for k, s in places], likeliest)
            )  # fmt: skip
            at += count + len(chunk.drafts)
        return made


def _likeliest(tokens: np.ndarray, logps: np.ndarray, place: tuple[int, int]) -> dict[int, float]:
    pairs = zip(tokens[place], logps[place], strict=True)
    return {int(token): float(logp) for token, logp in pairs}
