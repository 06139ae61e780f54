"""Attention as plain mathematics: the specification that every other implementation is held to.

Cost: 4 B N T S H FLOPs forward; the [B, N, T, S] matrix of logits lives in memory in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mask(
    T: int,
    S: int,
    *,
    causal: bool,
    window: int | Int[Array, ""] | None,
    q_offset: int | Int[Array, " B"] | Int[Array, ""],
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
) -> Bool[Array, "B T S"]:
    """True where query t may look at key s; the leading axis is 1 where all rows agree.

    Query t stands at position t + q_offset among the keys. A window of w lets it see the last w
    keys, its own included. Segments see only themselves.
    """
    q_pos = jnp.arange(T)[None, :, None] + jnp.reshape(jnp.asarray(q_offset), (-1, 1, 1))
    k_pos = jnp.arange(S)[None, None, :]
    allowed = jnp.ones((1, T, S), bool)
    if causal:
        allowed &= k_pos <= q_pos
    if window is not None:
        allowed &= k_pos > q_pos - window
    if q_segment_ids is not None and kv_segment_ids is not None:
        allowed &= q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    return allowed


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | Int[Array, ""] | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: int | Int[Array, " B"] | Int[Array, ""] = 0,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """softmax(scale q k^T) v with masks; returns (output in q's dtype, log-sum-exp in float32).

    A sink is one more logit a head, which takes its share of the weight and has no value (it is
    neither scaled nor capped); the log-sum-exp counts it. A row that sees no key gives zeros, and
    a log-sum-exp of minus infinity where there is no sink.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    factor = H**-0.5 if scale is None else scale
    allowed = mask(
        T, S, causal=causal, window=window, q_offset=q_offset,
        q_segment_ids=segment_ids[0] if segment_ids else None,
        kv_segment_ids=segment_ids[1] if segment_ids else None,
    )[:, None, None]  # fmt: skip
    grouped = q.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits = logits * factor
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(allowed, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    if sink is not None:
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    seen = total > 0
    weights = weights / jnp.where(seen, total, 1.0)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    return out.reshape(B, T, N, H), lse.reshape(B, N, T)
