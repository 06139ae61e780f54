"""Two contestants in turns, and how sure their ratio is.

They alternate, and which goes first alternates too, so that a drift of the clocks falls on both.
The interval of the ratio of medians is a bootstrap over the pairs, which keeps what a pair shared.
"""

from __future__ import annotations

import dataclasses
import time as _time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxinfra.measure.clock import Sample, warm_up

_DRAWS = 2000


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
        found = f"{self.ratio:.2f}x, 95 % {low:.2f}-{high:.2f}"
        if low <= 1 <= high:
            return f"{first} and {second} cannot be told apart ({found})"
        return f"{first} is as fast as {second} times {found}"


def ratio_interval(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[float, float]:
    """The 95 % bootstrap interval of median(second) / median(first), pairs kept together."""
    pairs = np.stack([first, second], axis=1)
    draws = np.random.default_rng(0).integers(0, len(pairs), (_DRAWS, len(pairs)))
    medians = np.median(pairs[draws], axis=1)
    low, high = np.quantile(medians[:, 1] / medians[:, 0], (0.025, 0.975))
    return float(low), float(high)


def compare(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    sync: Mapping[str, Callable[[Any], Any]] | None = None,
    clock: Callable[[], float] = _time.perf_counter,
) -> Comparison:
    """Times two contestants, `rounds` calls of each in turns, after warming both up.

    `sync` gives, by name, what waits for a contestant's result, where that is not jax's.
    """
    if len(contestants) != 2:
        raise ValueError(f"compare: give two contestants, not {len(contestants)}")
    names = list(contestants)
    waits = {name: (sync or {}).get(name, jax.block_until_ready) for name in names}
    for name in names:
        warm_up(contestants[name], waits[name])
    wall: dict[str, list[float]] = {name: [] for name in names}
    dispatch: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            begun = clock()
            result = contestants[name]()
            returned = clock()
            waits[name](result)
            wall[name].append(clock() - begun)
            dispatch[name].append(returned - begun)
    one, two = (Sample(tuple(wall[n]), tuple(dispatch[n])) for n in names)
    return Comparison((names[0], names[1]), (one, two))
