"""Which keys a run of queries sees: the blocks to visit, those that need no mask, and the mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


@dataclasses.dataclass(frozen=True)
class Sight:
    """The rules of a call for one row of its batch; `block` keys are visited at a time."""

    causal: bool
    segmented: bool
    S: int
    block: int
    offset: Any  # position of query 0 among the keys
    window: Any  # keys that a query sees, its own included, or None

    def blocks(self, first: Any, rows: int) -> tuple[Any, Any]:
        """The blocks [low, high) that one of the queries first to first + rows sees."""
        low = lax.div(self._oldest(first), self.block)
        return low, lax.max(low, lax.div(self._newest(first + rows - 1) + self.block, self.block))

    def whole(self, first: Any, rows: int, low: Any, high: Any) -> tuple[Any, Any]:
        """Those of [low, high) that every one of these queries sees in full."""
        if self.segmented:
            return low, low
        begin = lax.div(self._oldest(first + rows - 1) + self.block - 1, self.block)
        begin = lax.min(lax.max(begin, low), high)
        end = lax.div(self._newest(first) + 1, self.block)
        return begin, lax.max(begin, lax.min(end, high))

    def _oldest(self, query: Any) -> Any:
        """The first key that `query` sees."""
        if self.window is None:
            return jnp.int32(0)
        return lax.max(query + self.offset - self.window + 1, jnp.int32(0))

    def _newest(self, query: Any) -> Any:
        """The last key that `query` sees; -1 where it sees none."""
        last = jnp.int32(self.S - 1)
        if not self.causal:
            return last
        return lax.max(jnp.int32(-1), lax.min(query + self.offset, last))

    def mask(
        self, shape: tuple[int, int], block: Any, first: Any, segments: Any, interpret: Any
    ) -> Bool[Array, "q kv"]:
        """True where a query of `first` and on sees a key of `block`; `segments`: of both."""
        keys = _iota(shape, 1, interpret) + block * self.block
        positions = _iota(shape, 0, interpret) + (first + self.offset)
        seen = keys < self.S
        if self.causal:
            seen = jnp.logical_and(seen, keys <= positions)
        if self.window is not None:
            seen = jnp.logical_and(seen, keys > positions - self.window)
        if self.segmented:
            of_queries, of_keys = (
                lax.broadcast_in_dim(ids, shape, (axis,)) for axis, ids in enumerate(segments)
            )
            seen = jnp.logical_and(seen, of_queries == of_keys)
        return seen


def _iota(shape: tuple[int, int], axis: int, interpret: Any) -> Array:
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
