"""Attention over pages as plain mathematics: what every implementation is held to.

Cost: each token gathers every page of its row's table, T M page K H keys and as many values, and
makes 4 T N M page H FLOPs: for specification, not for serving.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.paged_attention.rows import places


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P K page H"],
    v_pages: Num[Array, "P K page H"],
    page_table: Int[Array, "B M"],
    starts: Int[Array, " B+1"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "P K page"] | None = None,
    v_scale: Float[Array, "P K page"] | None = None,
) -> Float[Array, "T N H"]:
    """softmax(scale q k^T) v of each token and the keys at or before its position in its row."""
    (T, N, H), K = q.shape, k_pages.shape[1]
    row, position = places(starts, lengths, T)

    def keys_of_tokens(pages, scales):
        taken = jnp.take(pages, page_table[row], axis=0, mode="clip").astype(jnp.float32)
        if scales is not None:
            taken *= jnp.take(scales, page_table[row], axis=0, mode="clip")[..., None]
        return jnp.moveaxis(taken, 2, 1).reshape(T, K, -1, H)

    k, v = keys_of_tokens(k_pages, k_scale), keys_of_tokens(v_pages, v_scale)
    key = jnp.arange(k.shape[2])
    seen = key <= position[:, None]
    if window is not None:
        seen &= key > position[:, None] - window
    grouped = q.astype(jnp.float32).reshape(T, K, N // K, H)
    logits = jnp.einsum("tkgh,tksh->tkgs", grouped, k) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(K, N // K, 1)
    if sink is not None:
        top = jnp.maximum(top, sink)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - top)
    weights /= jnp.where(total > 0, total, 1.0)
    v = jnp.where(seen[:, None, :, None], v, 0.0)  # a page that holds NaN stays out
    out = jnp.einsum("tkgs,tksh->tkgh", weights, v)
    return out.reshape(T, N, H).astype(q.dtype)
