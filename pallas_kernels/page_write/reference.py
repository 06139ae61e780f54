"""New tokens' queries, and their keys and values in pages, in plain jnp: the specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention import append


def page_write(
    qkv: Float[Array, "T r"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    cos: Float[Array, "T h"],
    sin: Float[Array, "T h"],
    slots: Int[Array, " T"],
    bias: Float[Array, " r"] | None,
    norms: tuple[Float[Array, " H"], Float[Array, " H"]] | None,
    *,
    eps: float,
    plus_one: bool,
) -> tuple[Array, Array, Array]:
    """(q [T, N, H], k_pages, v_pages). `pallas_kernels.page_write` says what they are."""
    (T, R), (_, K, _, H) = qkv.shape, k_pages.shape
    N = R // H - 2 * K
    y = qkv if bias is None else qkv + bias
    q, k, v = jnp.split(y.reshape(T, N + 2 * K, H), [N, N + K], axis=1)

    def turned(x: Array, weight: Array | None) -> Array:
        x = x.astype(jnp.float32)
        if weight is not None:
            scale = weight.astype(jnp.float32) + (1 if plus_one else 0)
            x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale
        low, high = jnp.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return jnp.concatenate([low * c - high * s, high * c + low * s], axis=-1).astype(qkv.dtype)

    q_norm, k_norm = norms or (None, None)
    k_pages = append(k_pages, turned(k, k_norm), slots)
    return turned(q, q_norm), k_pages, append(v_pages, v, slots)
