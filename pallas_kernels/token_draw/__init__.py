"""Drawing a token from each row of logits by a temperature and a number from 0 to 1, in one kernel.

Cost: the logits are read once, and one block of each row twice. XLA takes a pass for the largest,
one for the exponentials, one for their sum and two for the draw, and writes one of them.
`reference.py` is the specification.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _triton_compat, shards

__all__ = ["draw", "supported"]

BLOCK = 4096


def supported(logits_shape: tuple[int, ...], *, platform: str | None = None) -> str | None:
    """Why the kernel cannot draw from logits [S, V], or None if it can."""
    if reason := _triton_compat.refusal(platform) or shards.refusal():
        return reason
    if logits_shape[1] > BLOCK * 256:
        return f"the kernel takes {BLOCK * 256} logits a row, not {logits_shape[1]}"
    return None


def draw(
    logits: Float[Array, "S V"], temperature: Float[Array, " S"], uniform: Float[Array, " S"],
    *, block: int = BLOCK,
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:  # fmt: skip
    """A token a row and its log-probability, float32: the first at which the sum passes `uniform`.

    At temperature 0 the likeliest, told at temperature 1. Where no logit is finite, the
    log-probability is NaN.
    """
    from pallas_kernels.token_draw import triton_source

    S, V = logits.shape
    blocks = -(-V // block)
    shape = jax.ShapeDtypeStruct
    found = _triton_compat.call(
        triton_source.draw,
        [jnp.zeros((S,), jnp.int32), logits, temperature, uniform],
        [shape((S,), jnp.int32), shape((S,), jnp.int32), shape((S,), jnp.float32),
         shape((S, blocks), jnp.float32), shape((S, blocks), jnp.float32),
         shape((S, blocks), jnp.int32)],
        programs=S * blocks, aliases={0: 0}, V=V, BLOCK=block, BLOCKS=blocks,
        WIDE=1 << (blocks - 1).bit_length(), num_warps=8, num_stages=1,
    )  # fmt: skip
    return found[1], found[2]
