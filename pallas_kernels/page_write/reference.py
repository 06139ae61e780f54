"""New tokens' queries, and their keys and values in pages, in plain jnp: the specification."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.norm_rope.reference import norm_rope
from pallas_kernels.paged_attention import append


def page_write(
    qkv, k_pages, v_pages, cos, sin, slots, *, bias=None, norms=None, eps=0.0, plus_one=False
):
    """What `pallas_kernels.page_write` says."""
    (T, R), (_, K, _, H) = qkv.shape, k_pages.shape
    N = R // H - 2 * K
    y = qkv if bias is None else qkv + bias
    q, k, v = jnp.split(y.reshape(1, T, N + 2 * K, H), [N, N + K], axis=2)
    angles = cos[None, :, None], sin[None, :, None]
    q, k = norm_rope(q, k, *angles, *(norms or (None, None)), eps=eps, plus_one=plus_one)
    return q[0], append(k_pages, k[0], slots), append(v_pages, v[0], slots)
