"""Short sequences in the rows of long ones: a forward pass without the padding.

A batch's rows are as long as the longest, so where answers differ much in length most of a forward
pass is padding. Here the sequences are laid into fewer rows of the same length, first fit, longest
first; segment ids keep attention inside each and positions start at zero in each; then the hidden
states go back to where they would have been. What follows (heads, losses, aggregation) sees the
same arrays as without packing, so no loss knows of it.

    x = hidden(params, config, tokens, plan(sizes, S, 5))      # [B, S, D], for the cost of 5 rows

Cost: attention and products of `rows` rows in place of B; two gathers over [B, S]; and placing, one
small step a sequence on the device (B of them in a loop). Heads still take a row's T answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params


class Plan(NamedTuple):
    """Where B sequences stand in R rows of S tokens."""

    sizes: Int[Array, " B"]
    start: Int[Array, " B"]  # the first token's place, counted through all rows
    source: Int[Array, "R S"]  # which of the B S tokens stands here
    segments: Int[Array, "R S"]  # of a row, from 1; 0 where nothing stands
    fits: Bool[Array, ""]  # whether all had room; where not, the rest is of no use


def plan(sizes: Int[Array, " B"], S: int, rows: int) -> Plan:
    """Places `sizes` tokens a sequence, each at most S, into `rows` rows: first fit, decreasing."""
    B = sizes.shape[0]

    def put(room: tuple[Array, Array], size: Array) -> tuple[tuple[Array, Array], tuple]:
        left, count = room
        enough = left >= size
        row = jnp.argmax(enough)  # the first
        found = row * S + S - left[row], count[row] + 1, enough[row]
        return (left.at[row].add(-size), count.at[row].add(1)), found

    order = jnp.argsort(-sizes, stable=True)
    room = (jnp.full(rows, S, sizes.dtype), jnp.zeros(rows, jnp.int32))
    _, (starts, numbers, enough) = jax.lax.scan(put, room, sizes[order])
    start, number = (jnp.zeros(B, jnp.int32).at[order].set(a) for a in (starts, numbers))
    inside = jnp.arange(S) < sizes[:, None]
    place = jnp.where(inside, start[:, None] + jnp.arange(S), rows * S).ravel()  # beyond: dropped
    empty = jnp.zeros(rows * S, jnp.int32)
    source = empty.at[place].set(jnp.arange(B * S), mode="drop")
    segments = empty.at[place].set(jnp.repeat(number, S), mode="drop")
    return Plan(sizes, start, source.reshape(rows, S), segments.reshape(rows, S), jnp.all(enough))


def rows_for(sizes: Sequence[int] | np.ndarray, S: int) -> int:
    """Rows that `plan` needs for these sequences."""
    left: list[int] = []
    for size in sorted((int(s) for s in sizes), reverse=True):
        row = next((i for i, room in enumerate(left) if room >= size), len(left))
        if row == len(left):
            left.append(S)
        left[row] -= size
    return len(left)


def rows_of(share: float, B: int) -> int:
    """A share of B rows, as a number of rows; 0 for none."""
    return math.ceil(share * B)


def hidden(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    where: Plan | None = None,
    *,
    sure: bool = False,
    **options: Any,
) -> Float[Array, "B S D"]:
    """`jaxinfra.model.transformer.hidden` on rows packed as `where` says; by default on `tokens`.

    After a sequence's end stands its last state.

    Args:
      sure: that all fit (`rows_for`). Otherwise the program has both ways and takes the unpacked
        one for a batch that does not; under `jax.vmap` both are computed.
    """

    def plain(params: Params) -> Array:
        return transformer.hidden(params, config, tokens, **options)[0]

    if where is None:
        return plain(params)

    def packed(params: Params) -> Array:
        x, _ = transformer.hidden(
            params, config, tokens.ravel()[where.source], segment_ids=where.segments, **options
        )
        inside = jnp.minimum(jnp.arange(tokens.shape[1]), where.sizes[:, None] - 1)
        return x.reshape(-1, x.shape[-1])[where.start[:, None] + inside]

    return packed(params) if sure else jax.lax.cond(where.fits, packed, plain, params)
