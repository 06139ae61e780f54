"""Whole pages between the device and host memory, bit for bit.

Cost: the pages' bytes over the bus. Two programs move AT_ONCE pages a call; both are compiled when
a `PageMoves` is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decode.runner import Runner, ahead

AT_ONCE = 8


class PageMoves:
    """Moves pages of a runner, between two of its steps and in the thread that owns it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        places = np.zeros(AT_ONCE, np.int32)
        self._gather = ahead(_gather, runner.pool, places, donate=())
        self._scatter = ahead(
            _scatter, runner.pool, places, self._gather(runner.pool, places),
            out=jax.tree.map(lambda pages: pages.sharding, runner.pool),
        )  # fmt: skip

    def out(self, pages: Sequence[int]) -> Any:
        """A tree like the runner's pool, of arrays [len(pages), ...] in host memory."""
        pool = self._runner.pool
        parts = [
            jax.device_get(self._gather(pool, _filled(pages[i : i + AT_ONCE], 0)))
            for i in range(0, len(pages), AT_ONCE)
        ]
        if not parts:
            return jax.tree.map(lambda a: np.zeros((0, *a.shape[1:]), a.dtype), pool)
        return jax.tree.map(lambda *a: np.concatenate(a)[: len(pages)], *parts)

    def into(self, pages: Sequence[int], held: Any, start: int = 0) -> None:
        """Writes what `out` gave, from its page `start` on, into `pages`."""
        for i in range(0, len(pages), AT_ONCE):
            part = slice(start + i, start + min(i + AT_ONCE, len(pages)))
            part = jax.tree.map(lambda a, part=part: _whole(a[part]), held)
            at = _filled(pages[i : i + AT_ONCE], -1)
            self._runner.pool = self._scatter(self._runner.pool, at, part)


def _gather(pool: Any, source: Int[Array, " n"]) -> Any:
    return jax.tree.map(lambda pages: pages[source], pool)


def _scatter(pool: Any, target: Int[Array, " n"], held: Any) -> Any:
    def one(pages: Array, held: Array) -> Array:
        return pages.at[jnp.where(target < 0, pages.shape[0], target)].set(held, mode="drop")

    return jax.tree.map(one, pool, held)


def _filled(pages: Sequence[int], rest: int) -> np.ndarray:
    return np.asarray([*pages, *[rest] * (AT_ONCE - len(pages))], np.int32)


def _whole(held: np.ndarray) -> np.ndarray:
    return np.concatenate([held, np.zeros((AT_ONCE - len(held), *held.shape[1:]), held.dtype)])
