"""Attention by blocks of queries in plain XLA: runs everywhere, never holds the [T, S] matrix.

One block of queries meets all keys; its logits are recomputed in the backward pass. Memory is
[B, N, block, S] float32 instead of [B, N, T, S]; FLOPs are those of the reference forward, and one
more forward in the backward pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import reference


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    q_offset: int | Int[Array, " B"] | Int[Array, ""] = 0,
    block: int = 512,
    **options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The reference's result, `block` queries at a time; T need not be a multiple of `block`."""
    B, T, N, H = q.shape
    blocks = -(-T // block)
    pad = blocks * block - T
    q_blocks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q_blocks = q_blocks.reshape(B, blocks, block, N, H).swapaxes(0, 1)
    q_segments = None
    if segment_ids is not None:
        q_segments = jnp.pad(segment_ids[0], ((0, 0), (0, pad)), constant_values=-1)
        q_segments = q_segments.reshape(B, blocks, block).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def one(args):
        q_block, q_segment, index = args
        segments = None if segment_ids is None else (q_segment, segment_ids[1])
        offset = q_offset + index * block
        return reference.attention(q_block, k, v, segment_ids=segments, q_offset=offset, **options)

    out, lse = jax.lax.map(one, (q_blocks, q_segments, jnp.arange(blocks)))
    out = out.swapaxes(0, 1).reshape(B, blocks * block, N, H)[:, :T]
    lse = jnp.moveaxis(lse, 0, 2).reshape(B, N, blocks * block)[:, :, :T]
    return out, lse
