"""Two contestants in turns, and how sure their ratio is.

They alternate, and which goes first alternates too, so that a drift of the clocks falls on both.
The interval of the ratio of medians is a bootstrap over the pairs, which keeps what a pair shared.
"""

from __future__ import annotations

import dataclasses
import time as _time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfra.measure.clock import Sample, warm_up

_DRAWS = 2000
_LEAST = 5  # pairs; of fewer the bootstrap draws too narrow an interval


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two samples taken in turns; `ratio` is how many times faster the first is."""

    names: tuple[str, str]
    samples: tuple[Sample, Sample]

    @property
    def ratio(self) -> float:
        """Median seconds of the second over those of the first."""
        return self.samples[1].median / self.samples[0].median

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of `ratio`; the same samples always give the same."""
        return ratio_interval(self.samples[0].wall, self.samples[1].wall)

    def verdict(self) -> str:
        """One sentence: who is how many times faster, or that the samples cannot tell."""
        low, high = self.interval
        first, second = self.names
        if low <= 1 <= high:
            found = f"{self.ratio:.2f}x, 95 % {low:.2f}-{high:.2f}"
            return f"{first} and {second} cannot be told apart ({found})"
        return f"{first} is {self.ratio:.2f}x the speed of {second} (95 % {low:.2f}-{high:.2f})"


def ratio_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of median(second) / median(first), pairs kept together.

    A percentile bootstrap (Efron, 1979) from a fixed seed. Raises ValueError for fewer than five
    pairs or samples of different lengths.
    """
    if len(first) != len(second) or len(first) < _LEAST:
        raise ValueError(
            f"ratio_interval: {len(first)} and {len(second)} samples are no {_LEAST} pairs or more"
        )
    pairs = np.stack([first, second], axis=1)
    draws = np.random.default_rng(0).integers(0, len(pairs), (_DRAWS, len(pairs)))
    medians = np.median(pairs[draws], axis=1)
    low, high = np.quantile(medians[:, 1] / medians[:, 0], (0.025, 0.975))
    return float(low), float(high)


def compare(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    batch: int = 1,
    sync: Mapping[str, Callable[[Any], Any]] | None = None,
    clock: Callable[[], float] = _time.perf_counter,
) -> Comparison:
    """Times two contestants, `rounds` turns of each, after warming both up.

    Args:
      batch: calls in a turn, queued at once and waited for once; the samples are seconds a call.
        More than 1 hides the dispatch of work that is shorter than it on a GPU or TPU.
      sync: by name, what waits for a contestant's result, where that is not jax's. Only jax's
        compiles are seen: call another framework's function until it has compiled.
    """
    if len(contestants) != 2:
        raise ValueError(f"compare: give two contestants, not {len(contestants)}")
    if rounds < _LEAST or batch < 1:
        raise ValueError(f"compare: {rounds=} must be at least {_LEAST} and {batch=} at least 1")
    names = list(contestants)
    waits = {name: (sync or {}).get(name, jax.block_until_ready) for name in names}
    for name in names:
        warm_up(contestants[name], waits[name])
    wall: dict[str, list[float]] = {name: [] for name in names}
    dispatch: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            call, result = contestants[name], None
            begun = clock()
            for _ in range(batch):
                result = call()
            returned = clock()
            waits[name](result)
            wall[name].append((clock() - begun) / batch)
            dispatch[name].append((returned - begun) / batch)
            del result  # memory for the other contestant
    one, two = (Sample(tuple(wall[n]), tuple(dispatch[n])) for n in names)
    return Comparison((names[0], names[1]), (one, two))
