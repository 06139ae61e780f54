"""Which queries see a run of keys: the blocks to visit, those without a mask, and the mask.

The converse of `sight`, for gradients of keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


@dataclasses.dataclass(frozen=True)
class SeenBy:
    """The rules of a call for one row of its batch; `block` queries are visited at a time."""

    causal: bool
    segmented: bool
    T: int
    block: int
    offset: Any  # position of query 0 among the keys
    window: Any  # keys that a query sees, its own included, or None

    def blocks(self, first: Any, rows: int) -> tuple[Any, Any]:
        """The blocks [low, high) of queries that see one of the keys first to first + rows."""
        low = lax.div(self._oldest(first), self.block)
        newest = self._newest(first + rows - 1)
        return low, lax.max(low, lax.div(newest + self.block, self.block))

    def whole(self, first: Any, rows: int, low: Any, high: Any) -> tuple[Any, Any]:
        """Those of [low, high) whose every query sees all these keys.

        Queries after the last count as such: their weights are zero.
        """
        if self.segmented:
            return low, low
        begin = lax.div(self._oldest(first + rows - 1) + self.block - 1, self.block)
        begin = lax.min(lax.max(begin, low), high)
        if self.window is None:
            return begin, high
        end = lax.div(self._newest(first) + 1, self.block)
        return begin, lax.max(begin, lax.min(end, high))

    def _oldest(self, key: Any) -> Any:
        """The first query that sees `key`."""
        return lax.max(key - self.offset, jnp.int32(0)) if self.causal else jnp.int32(0)

    def _newest(self, key: Any) -> Any:
        """The last query that sees `key`; -1 where none does."""
        last = jnp.int32(self.T - 1)
        if self.window is None:
            return last
        return lax.max(jnp.int32(-1), lax.min(key - self.offset + self.window - 1, last))

    def mask(
        self, shape: tuple[int, int], block: Any, first: Any, segments: Any, interpret: Any
    ) -> Bool[Array, "kv q"]:
        """True where a key of `first` and on is seen by a query of `block`; `segments`: of both."""
        positions = _iota(shape, 1, interpret) + (block * self.block + self.offset)
        keys = _iota(shape, 0, interpret) + first
        seen = keys <= positions if self.causal else keys >= 0
        if self.window is not None:
            seen = jnp.logical_and(seen, keys > positions - self.window)
        if self.segmented:
            of_keys, of_queries = (
                lax.broadcast_in_dim(ids, shape, (axis,)) for axis, ids in enumerate(segments)
            )
            seen = jnp.logical_and(seen, of_queries == of_keys)
        return seen


def _iota(shape: tuple[int, int], axis: int, interpret: Any) -> Array:
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
