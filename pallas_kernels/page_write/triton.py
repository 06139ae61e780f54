"""New tokens' queries, keys and values in one launch of a Triton kernel, a program a token."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import _triton_compat

LARGEST = 2**14  # numbers of a token's queries and keys


def page_write(
    qkv: Float[Array, "T r"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    cos: Float[Array, "T h"],
    sin: Float[Array, "T h"],
    slots: Int[Array, " T"],
    *,
    bias: Float[Array, " r"] | None = None,
    norms: tuple[Float[Array, " H"], Float[Array, " H"]] | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
) -> tuple[Array, Array, Array]:
    """(q [T, N, H], k_pages, v_pages), the pages in the buffers they came in.

    Args:
      qkv: r = (N + 2K) H: queries, keys and values of T tokens as one projection gives them.
      cos, sin: float32, of each token's position, h = H / 2.
      slots: where a token's key and value go, page times size plus place; below zero nowhere.
      norms: weights of the norms of queries and of keys over H; plus_one: they count from 1.
    """
    from pallas_kernels.page_write import triton_source

    (T, R), (_, K, page, H) = qkv.shape, k_pages.shape
    N = R // H - 2 * K
    shape = jax.ShapeDtypeStruct
    numbers = power(N + K) * H
    q, k_pages, v_pages = _triton_compat.call(
        triton_source.write,
        [qkv, k_pages, v_pages, cos, sin, slots, qkv if bias is None else bias,
         *(norms or (qkv, qkv))],
        [shape((T, N, H), qkv.dtype), *(shape(a.shape, a.dtype) for a in (k_pages, v_pages))],
        programs=T, aliases={1: 1, 2: 2}, num_warps=max(1, min(8, numbers // 1024)), num_stages=1,
        N=N, K=K, H=H, PAGE=page, HEADS=power(N + K), KEY_HEADS=power(K), BIAS=bias is not None,
        NORMED=norms is not None, EPS=eps, PLUS_ONE=plus_one,
    )  # fmt: skip
    return q, k_pages, v_pages


def power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()
