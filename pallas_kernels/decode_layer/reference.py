"""A transformer layer of one token over pages, in plain jnp: the specification, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.norm_rope.reference import rotate
from pallas_kernels.paged_attention import append, reference
from pallas_kernels.rms_norm.reference import rms_norm


def decode_layer(
    x: Float[Array, " D"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    weights: Any,
    cos: Float[Array, " h"],
    sin: Float[Array, " h"],
    table: Int[Array, " M"],
    length: Int[Array, ""],
    slot: Int[Array, ""],
    *,
    scale: float,
    eps: float,
) -> tuple[Array, Array, Array]:
    """(x, k_pages, v_pages) after the layer. `pallas_kernels.decode_layer` says what they are."""
    w = jax.tree.map(lambda a: a.astype(jnp.float32), weights)
    (_, K, _, H), N = k_pages.shape, w.o.shape[1] // k_pages.shape[3]

    def norm(x: Array, weight: Array | None) -> Array:
        return x if weight is None else rms_norm(x, weight, eps=eps)

    y = w.qkv @ norm(x, w.attn_norm)
    if w.qkv_bias is not None:
        y = y + w.qkv_bias
    q, k, v = jnp.split(y.reshape(N + 2 * K, H), [N, N + K])
    q, k = rotate(norm(q, w.q_norm), cos, sin), rotate(norm(k, w.k_norm), cos, sin)
    slots = jnp.where(length > 0, slot, -1)[None]
    k_pages, v_pages = append(k_pages, k[None], slots), append(v_pages, v[None], slots)
    # The token sees itself whether or not it is kept.
    attended = reference.paged_attention(
        q[None].astype(jnp.float32), append(k_pages, k[None], _last(table, length, k_pages)),
        append(v_pages, v[None], _last(table, length, v_pages)), table[None],
        jnp.array([0, 1], jnp.int32), length[None], scale=scale,
    )[0]  # fmt: skip
    x = x + w.o @ attended.reshape(-1)
    gate, up = jnp.split(w.gate_up @ norm(x, w.mlp_norm), 2)
    return x + w.down @ (jax.nn.silu(gate) * up), k_pages, v_pages


def _last(table: Array, length: Array, pages: Array) -> Array:
    size = pages.shape[2]
    return (table[(length - 1) // size] * size + (length - 1) % size)[None]
