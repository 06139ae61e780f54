"""What the TPU's attention kernels share: which blocks of queries and keys meet, and how.

Query t stands at position t + offset among the keys; offset and window are numbers known when the
kernel runs. What belongs to a query (its largest logit, its log-sum-exp) stands in every lane of
its row, [rows, LANES]: read as one lane it would have to be moved to all others at every use, which
nearly doubles the length of the forward pass's schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LANES = 128
LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Call:
    """What is fixed when a call is compiled."""

    mask: Mask
    scale: float
    soft_cap: float | None
    interpret: Any

    def logits(self, products: Array) -> Array:
        """Logits in base 2 from q k^T."""
        if self.soft_cap is None:
            return products * (self.scale * LOG2E)
        return jnp.tanh(products * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2E)

    def through_cap(self, dlogits: Array, logits: Array) -> Array:
        """The gradient of the capped logits becomes that of the uncapped ones."""
        if self.soft_cap is None:
            return dlogits
        tanh = logits / (self.soft_cap * LOG2E)
        return dlogits * (1 - tanh * tanh)

    def cost(self, products: int, *operands: Array) -> pl.CostEstimate:
        """What the compiler may reckon with: `products` of H FLOPs a pair and head, and an exp2."""
        B, N, _, H = operands[0].shape
        pairs = B * N * self.mask.pairs
        return pl.CostEstimate(
            flops=2 * products * pairs * H,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands),
        )


def like(x: Array, *shape: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """An output that varies over the devices of a `shard_map` as x does."""
    varies = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, manual_axis_type=varies)


def product(a: Array, b: Array, along_a: int, along_b: int) -> Array:
    """a and b contracted along one axis each, in float32; float32 operands are not rounded."""
    if b.shape[1 - along_b] == 1:  # Pallas then lowers a sum of products, and not in bfloat16
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((along_a,), (along_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def column_of(row: Array) -> Array:
    """[1, rows] as [rows, LANES], every lane alike."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def spread(alike: Array, width: int) -> Array:
    """[rows, LANES], every lane alike, as [rows, width]: copies of registers, no lane is moved."""
    whole, rest = divmod(width, LANES)
    parts = [alike] * whole + ([alike[:, :rest]] if rest else [])
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def row_of(column: Array) -> Array:
    """[rows, LANES], every lane alike, as [1, rows]."""
    return column.T[:1]


def existing(block: Array, index: Any, size: int) -> Array:
    """A block of rows with zeros where it reaches past the array's `size` rows."""
    rows = block.shape[0]
    if size % rows == 0:
        return block
    exist = index * rows + lax.broadcasted_iota(jnp.int32, block.shape, 0) < size
    return jnp.where(exist, block, jnp.zeros_like(block))


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask of T queries and S keys in blocks of `queries` x `keys`."""

    T: int
    S: int
    queries: int
    keys: int
    causal: bool
    windowed: bool
    segmented: bool
    span: int | None  # the window where it is known when compiled

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.T, self.queries)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.S, self.keys)

    @property
    def key_steps(self) -> int:
        """Blocks of keys that a block of queries may meet."""
        return self._steps(self.key_blocks, self.queries, self.keys)

    @property
    def query_steps(self) -> int:
        """Blocks of queries that a block of keys may meet."""
        return self._steps(self.query_blocks, self.keys, self.queries)

    def _steps(self, blocks: int, rows: int, block: int) -> int:
        if not self.causal or self.span is None:
            return blocks
        return min(blocks, (rows + self.span - 3) // block + 2)

    @property
    def pairs(self) -> int:
        """About how many pairs the kernels compute, of queries and keys that end together."""
        rectangle = self.T * min(self.S, self.key_steps * self.keys)
        triangle = self.T * min(self.T, self.S) // 2 if self.causal and self.span is None else 0
        return rectangle - triangle

    def keys_of(self, i: Any, offset: Any, window: Any) -> tuple[Any, Any]:
        """First and last block of keys that block i of the queries meets; last < first: none."""
        first, last = jnp.int32(0), jnp.int32(self.key_blocks - 1)
        if self.causal:
            bottom = lax.min((i + 1) * self.queries, self.T) - 1 + offset
            last = lax.min(last, _block(bottom, self.keys))
        if self.windowed:
            top = i * self.queries + offset
            first = lax.max(first, _block(top - window + 1, self.keys))
        return first, last

    def queries_of(self, j: Any, offset: Any, window: Any) -> tuple[Any, Any]:
        """First and last block of queries that block j of the keys meets; last < first: none."""
        first, last = jnp.int32(0), jnp.int32(self.query_blocks - 1)
        if self.causal:
            first = lax.max(first, _block(j * self.keys - offset, self.queries))
        if self.windowed:
            right = lax.min((j + 1) * self.keys, self.S) - 1
            last = lax.min(last, _block(right + window - 1 - offset, self.queries))
        return first, last

    def whole(self, i: Any, j: Any, offset: Any, window: Any) -> Any:
        """Whether all queries of block i and all keys of block j exist and see each other."""
        last_query, last_key = (i + 1) * self.queries - 1, (j + 1) * self.keys - 1
        whole = (last_query < self.T) & (last_key < self.S)
        if self.causal:
            whole &= last_key <= i * self.queries + offset
        if self.windowed:
            whole &= j * self.keys > last_query + offset - window
        return whole

    def where_they_meet(
        self, i: Any, j: Any, present: Any, offset: Any, window: Any, step: Callable[[bool], None]
    ) -> None:
        """`step(masked)` if `present`, unmasked where the blocks are whole."""
        edges = self.T % self.queries or self.S % self.keys
        if not (self.causal or self.windowed or self.segmented or edges):
            pl.when(present)(lambda: step(False))
        elif self.segmented:
            pl.when(present)(lambda: step(True))
        else:
            whole = self.whole(i, j, offset, window)
            pl.when(present & whole)(lambda: step(False))
            pl.when(present & jnp.logical_not(whole))(lambda: step(True))

    def visible(
        self, shape: tuple[int, ...], queries_along: int, i: Any, j: Any, offset: Any, window: Any
    ) -> jax.Array:
        """Which pairs of block i's queries, along that axis, and block j's keys see each other."""
        t = i * self.queries + lax.broadcasted_iota(jnp.int32, shape, queries_along)
        s = j * self.keys + lax.broadcasted_iota(jnp.int32, shape, 1 - queries_along)
        seen = (t < self.T) & (s < self.S)
        if self.causal:
            seen &= s <= t + offset
        if self.windowed:
            seen &= s > t + offset - window
        return seen


def at(first: Any, last: Any, step: Any, blocks: int) -> Any:
    """The block to hold at a step from `first` on: after `last` none is fetched any more."""
    return lax.clamp(jnp.int32(0), lax.min(first + step, last), jnp.int32(blocks - 1))


def _block(place: Any, block: int) -> Any:
    """The block that a place is in; -1 for all places below 0."""
    return lax.div(lax.max(place + block, jnp.int32(0)), jnp.int32(block)) - 1


def specs_where_queries_stay(
    mask: Mask, group: int, H: int
) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, list[pl.BlockSpec]]:
    """What a step of the grid (B, N, blocks of queries, steps) holds: of q, of k, of lse, of ids.

    The first scalars that the kernel prefetches are the offsets [B] and the window [1].
    """

    def block_of_keys(b, i, step, offsets, windows, *_):
        return at(*mask.keys_of(i, offsets[b], windows[0]), step, mask.key_blocks)

    def of_key(b, n, i, step, *scalars):
        return b, n // group, block_of_keys(b, i, step, *scalars), 0

    def segment_of_key(b, n, i, step, *scalars):
        return b, 0, block_of_keys(b, i, step, *scalars)

    by_query = pl.BlockSpec((None, None, mask.queries, H), lambda b, n, i, *_: (b, n, i, 0))
    by_key = pl.BlockSpec((None, None, mask.keys, H), of_key)
    row = pl.BlockSpec((None, None, 1, mask.queries), lambda b, n, i, *_: (b, n, 0, i))
    segments = [
        pl.BlockSpec((None, 1, mask.queries), lambda b, n, i, *_: (b, 0, i)),
        pl.BlockSpec((None, 1, mask.keys), segment_of_key),
    ]
    return by_query, by_key, row, segments if mask.segmented else []
