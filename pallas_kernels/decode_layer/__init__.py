"""One token through a whole transformer layer in one kernel: what a batch of one wants.

A decode step of one row reads each weight once and computes next to nothing: split into a dozen
kernels a layer, a small model spends more time between them than in them. Here a layer is one
launch whose programs meet four times. `reference.py` is the specification.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels import _triton_compat, shards
from pallas_kernels.decode_layer import triton

__all__ = ["LayerWeights", "counters", "decode_layer", "supported"]


@struct.dataclass
class LayerWeights:
    """A pre-norm layer with a SwiGLU feed-forward; matrices [out, in]."""

    attn_norm: Array  # [D]
    qkv: Array  # [(N + 2K) H, D]
    o: Array  # [D, N H]
    mlp_norm: Array  # [D]
    gate_up: Array  # [2 F, D]
    down: Array  # [D, F]
    qkv_bias: Array | None = None  # [(N + 2K) H]
    q_norm: Array | None = None  # [H]
    k_norm: Array | None = None  # [H]


def supported(
    weights: LayerWeights, pages_shape: tuple[int, ...], pages_dtype, *, platform: str | None = None
) -> str | None:
    """Why the kernel cannot take such a layer over pages [P,K,page,H], or None if it can."""
    if reason := _triton_compat.refusal(platform) or shards.refusal():
        return reason
    _, K, _, H = pages_shape
    dtype = weights.qkv.dtype
    if dtype not in (jnp.bfloat16, jnp.float16) or pages_dtype != dtype:
        return f"the kernel takes bfloat16 and float16 throughout, not {dtype} over {pages_dtype}"
    if H not in (16, 32, 64, 128, 256):
        return f"the kernel takes a head width of 16, 32, 64, 128 or 256, not {H}"
    if (programs := _programs(K)) < K:
        return f"{K} key heads need as many multiprocessors; the device has {programs}"
    return None


def counters(K: int) -> Int[Array, " c"]:
    """What the programs of a launch count in; a launch leaves it as it was."""
    return jnp.zeros((2 + K,), jnp.int32)


def decode_layer(
    x: Float[Array, " D"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    counters: Int[Array, " c"],
    weights: LayerWeights,
    cos: Float[Array, " h"],
    sin: Float[Array, " h"],
    table: Int[Array, " M"],
    facts: Int[Array, " 2"],
    *,
    scale: float,
    eps: float,
    **options: Any,
) -> tuple[Array, Array, Array, Array]:
    """(x, k_pages, v_pages, counters) after the layer, in the buffers they came in.

    Args:
      x: float32, the residual stream.
      cos, sin: of the token's position, h = H / 2.
      table: its pages; position p is place p % page of page table[p // page].
      facts: its length with this token, and where its key and value are written, page * size +
        place, or -1: then they are seen by itself alone.
      options: `programs` and `config`, of `decode_layer.triton.launch`.
    """
    options = {"programs": _programs(k_pages.shape[1])} | options
    x, k_pages, v_pages, counters, *_ = triton.launch(
        x, k_pages, v_pages, counters, weights, cos, sin, table, facts,
        scale=scale, eps=eps, **options,
    )  # fmt: skip
    return x, k_pages, v_pages, counters


def _programs(K: int) -> int:
    """One for each multiprocessor, a multiple of K where that is possible."""
    cores = getattr(jax.devices()[0], "core_count", 132)
    return cores // K * K or cores
