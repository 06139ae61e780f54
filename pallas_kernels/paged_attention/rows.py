"""Where queries stand: rows of a batch lie one after another in q, each ending at its length."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def places(
    starts: Int[Array, " B+1"], lengths: Int[Array, " B"], T: int
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """Each token's row, and its position among that row's keys; position -1 where it has no row."""
    B = lengths.shape[0]
    token = jnp.arange(T, dtype=jnp.int32)
    row = jnp.sum(starts[None] <= token[:, None], axis=1, dtype=jnp.int32) - 1
    inside = (row >= 0) & (row < B)
    row = jnp.clip(row, 0, B - 1)
    return row, jnp.where(inside, lengths[row] - starts[row + 1] + token, -1)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`size` consecutive queries of a row at a time, each with the G heads of a key head.

    Arrays [X] of a tile's row, first token, and the positions of its first and last query; the
    last one is -1 where a tile holds no query.
    """

    size: int
    row: Array
    first: Array
    position: Array
    last: Array

    @property
    def _tokens(self) -> Int[Array, "X size"]:
        return self.first[:, None] + jnp.arange(self.size, dtype=jnp.int32)

    def pack(self, q: Float[Array, "T N H"], K: int, multiple: int) -> Float[Array, "X K R H"]:
        """Tiles of R rows, a multiple: row r is of the tile's query r // G and head r % G."""
        N, H = q.shape[1:]
        R = self.size * N // K
        tiles = (
            q.at[self._tokens].get(mode="fill", fill_value=0).reshape(-1, self.size, K, N // K, H)
        )
        tiles = jnp.moveaxis(tiles, 2, 1).reshape(-1, K, R, H)
        return jnp.pad(tiles, ((0, 0), (0, 0), (0, -R % multiple), (0, 0)))

    def unpack(self, out: Float[Array, "X K R H"], like: Float[Array, "T N H"]) -> Array:
        """What tiles of outputs are in q's order and dtype; zeros for tokens of no row."""
        (T, N, H), K = like.shape, out.shape[1]
        out = out[:, :, : self.size * N // K].reshape(-1, K, self.size, N // K, H)
        out = jnp.moveaxis(out, 1, 2).reshape(-1, N, H).astype(like.dtype)
        exists = self.position[:, None] + jnp.arange(self.size) <= self.last[:, None]
        token = jnp.where(exists, self._tokens, T).reshape(-1)
        return jnp.zeros_like(like).at[token].set(out, mode="drop")


def tiles(starts: Int[Array, " B+1"], lengths: Int[Array, " B"], T: int, size: int) -> Tiles:
    """The tiles of a batch: the tokens themselves where `size` is 1, T // size + B otherwise.

    Row b's begin at tile starts[b] // size + b, so that they have room whatever the rows are.
    """
    if size == 1:
        row, position = places(starts, lengths, T)
        return Tiles(size, row, jnp.arange(T, dtype=jnp.int32), position, position)
    B = lengths.shape[0]
    begins = starts[:-1] // size + jnp.arange(B, dtype=jnp.int32)
    tile = jnp.arange(T // size + B, dtype=jnp.int32)
    row = jnp.sum(begins[None] <= tile[:, None], axis=1, dtype=jnp.int32) - 1
    first = starts[row] + (tile - begins[row]) * size
    position = lengths[row] - starts[row + 1] + first
    last = jnp.minimum(position + size, lengths[row]) - 1
    return Tiles(size, row, first, position, jnp.where(last < position, -1, last))


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which keys the rows of a tile see."""

    G: int
    window: int | None

    def oldest(self, position: Any) -> Any:
        """The first key that a query at `position` sees."""
        if self.window is None:
            return position * 0
        return lax.max(position - (self.window - 1), position * 0)

    def mask(self, row: Any, key: Any) -> Any:
        """True where a row of a tile sees a key, counted from the position of its first query.

        Row r is of query r // G: key s stands at most there where s G <= r.
        """
        seen = key * self.G <= row
        if self.window is not None:
            seen = jnp.logical_and(seen, (key + self.window) * self.G > row)
        return seen
