"""Which rows a tile covers: groups begin at any row, copies at multiples of 8.

The copy engine moves rows in pieces of 8, so a group's first tile begins at the piece that its
first row is in, up to 7 rows of the group before it. What a tile has of other groups is computed
and not stored, or, where rows are summed over, set to zero first. No tile reaches past the last
row of the array where one fits: the last one is moved up and takes fewer rows as its own.

Cost: a few XLA operations on [G] and [T] integers, T = about M / tile + G.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

PIECE = 8  # rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Of each of T tiles of rows: its group, first row, and which of its rows are the group's.

    Tiles of groups come first, `some[0]` of them; up to `some[1]` follow those of rows behind the
    last group.
    """

    group: Int[Array, " T"]
    first: Int[Array, " T"]
    low: Int[Array, " T"]  # the first own row, counted from the tile's first
    high: Int[Array, " T"]  # the one after the last
    some: Int[Array, " 2"]


def bounds(counts: Int[Array, " G"], M: int) -> tuple[Int[Array, " G"], Int[Array, " G"]]:
    """First row of each group and the one after its last; no group reaches past row M."""
    ends = jnp.cumsum(counts.astype(jnp.int32))
    return tuple(jnp.minimum(x, M) for x in (ends - counts.astype(jnp.int32), ends))  # type: ignore[return-value]


def row_tiles(counts: Int[Array, " G"], M: int, tile: int) -> RowTiles:
    """The tiles of `tile` rows, a multiple of 8, of an array of M rows, padded to whole pieces."""
    start, end = bounds(counts, M)
    start, end = jnp.append(start, end[-1]), jnp.append(end, jnp.int32(M))
    begin = start // PIECE * PIECE
    number = jnp.where(end > start, -(-(end - begin) // tile), 0)
    upto = jnp.cumsum(number)
    groups = len(counts) + 1
    T = (M + min(groups, M) * (tile + PIECE - 2)) // tile
    t = jnp.arange(T, dtype=jnp.int32)
    group = jnp.sum(upto[None] <= t[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, groups - 1)
    nominal = begin[group] + (t - upto[group] + number[group]) * tile
    first = jnp.minimum(nominal, last_begin(M, tile))
    return RowTiles(
        group=group,
        first=first,
        low=jnp.maximum(start[group], nominal) - first,
        high=jnp.minimum(end[group], nominal + tile) - first,
        some=upto[-2:],
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSteps:
    """Of each group: its first row, the one after its last, where its steps begin, their number."""

    start: Int[Array, " G"]
    end: Int[Array, " G"]
    begin: Int[Array, " G"]
    number: Int[Array, " G"]


def row_steps(counts: Int[Array, " G"], M: int, step: int) -> RowSteps:
    """How a sum over each group's rows goes, `step` rows, a multiple of 8, at a time."""
    start, end = bounds(counts, M)
    begin = start // PIECE * PIECE
    return RowSteps(start, end, begin, jnp.where(end > start, -(-(end - begin) // step), 0))


def last_begin(M: int, rows: int) -> int:
    """The last row at which `rows` rows may begin."""
    return max(-(-M // PIECE) * PIECE - rows, 0)


def in_bands(i: Any, down: Any, across: int, band: int) -> tuple[Any, Any]:
    """Row and column of tile number i of down x across: bands of `band` columns, row by row."""
    band = min(band, across)
    before = jax.lax.div(i, down * band)
    width = jax.lax.min(jnp.int32(band), across - before * band)
    within = i - before * (down * band)
    return jax.lax.div(within, width), before * band + jax.lax.rem(within, width)
