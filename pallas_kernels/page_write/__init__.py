"""New tokens' queries, keys and values between their projection and attention over pages.

Bias, norms over the head width, rotation, and the write of keys and values into their pages are
each a few kernels of XLA that read what the one before wrote; here they are one launch that reads
a row of the projection once. `reference.py` is the specification.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import _triton_compat, shards
from pallas_kernels.page_write import triton
from pallas_kernels.page_write.triton import page_write

__all__ = ["page_write", "supported"]


def supported(
    qkv_dtype, qkv_width: int, pages_shape: tuple[int, ...], pages_dtype, *,
    platform: str | None = None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot write such rows [T, qkv_width] into pages [P,K,page,H], or None."""
    if reason := _triton_compat.refusal(platform) or shards.refusal():
        return reason
    _, K, _, H = pages_shape
    if jnp.dtype(qkv_dtype) not in (jnp.bfloat16, jnp.float16) or pages_dtype != qkv_dtype:
        return f"the kernel takes bfloat16 and float16 throughout, not {qkv_dtype} to {pages_dtype}"
    if H & (H - 1) or H < 16:
        return f"the kernel takes a head width that is a power of two from 16 on, not {H}"
    if triton.power(qkv_width // H - K) * H > triton.LARGEST:
        return f"the kernel takes {triton.LARGEST} numbers of queries and keys, not {qkv_width}"
    return None
