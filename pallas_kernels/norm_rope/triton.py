"""Norms and rotation of heads by Triton kernels through jax-triton, for NVIDIA GPUs from 8.0 on.

A program takes all query and key heads of some positions, so that their angles are read once, and
keeps them in registers from their statistics to their result. Backward, as many programs as fill
the GPU walk over the positions, each with sums of its own of the norms' gradients, which XLA then
adds up: always the same bits. There is no kernel in Mosaic GPU: nothing is multiplied by a tensor
core.

Alone, on one H200, the best of the bench's schedules took 0.33 to 0.55 of XLA's time for norms with
rotation, and 0.96 without them (`jaxinfra.kernels.rope_bench`). Within a whole step they were not
timed yet, and so they are never chosen unasked. XLA does not partition calls.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _compat, _triton_compat, shards

LARGEST = 2**14  # numbers of a position's query heads


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of q of a program and of a thread; programs a multiprocessor backward.

    `each` numbers a thread gives a program its warps, 16 at the most.
    """

    tile: int = 2048
    each: int = 16
    programs: int = 8


def refusal(*, platform: str, N: int, K: int, H: int) -> str | None:
    """Why Triton cannot take such heads, or None if it can."""
    if reason := _triton_compat.refusal(platform) or shards.refusal():
        return reason
    if _power(max(N, K)) * _power(H) > LARGEST:
        return f"the kernels take heads of {LARGEST} numbers in all, not {max(N, K)} of {H}"
    return None


def forward(
    q: Float[Array, "M N H"], k: Float[Array, "M K H"], cos: Float[Array, "M h"],
    sin: Float[Array, "M h"], weights: tuple[Float[Array, " H"], Float[Array, " H"]] | None,
    *, eps: float, plus_one: bool, config: Config = Config(),
) -> list[Array]:  # fmt: skip
    """q and k after norms, where there are weights, and rotation."""
    from pallas_kernels.norm_rope import triton_source

    sizes = _sizes(q.shape[1], k.shape[1], q.shape[2], config)
    return _triton_compat.call(
        triton_source.forward,
        [q, k, cos, sin, *(weights or (q, k)), q.shape[0]],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)],
        programs=-(-q.shape[0] // sizes["TOKENS"]), NORMED=weights is not None, EPS=eps,
        PLUS_ONE=plus_one, num_stages=1, **sizes,
    )  # fmt: skip


def backward(
    q: Float[Array, "M N H"], k: Float[Array, "M K H"], q_slope: Float[Array, "M N H"],
    k_slope: Float[Array, "M K H"], cos: Float[Array, "M h"], sin: Float[Array, "M h"],
    weights: tuple[Float[Array, " H"], Float[Array, " H"]],
    *, eps: float, plus_one: bool, config: Config = Config(),
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Gradients of q and k before their norms, and of both weights, float32."""
    from pallas_kernels.norm_rope import triton_source

    M, _, H = q.shape
    sizes = _sizes(q.shape[1], k.shape[1], q.shape[2], config)
    programs = min(-(-M // sizes["TOKENS"]), config.programs * _compat.multiprocessors(False))
    parts = jax.ShapeDtypeStruct((programs, H), jnp.float32)
    dq, dk, *of_weights = _triton_compat.call(
        triton_source.backward,
        [q, k, q_slope, k_slope, cos, sin, *weights, M],
        [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)), parts, parts],
        programs=programs, EPS=eps, PLUS_ONE=plus_one, PROGRAMS=programs, num_stages=1, **sizes,
    )  # fmt: skip
    dq_norm, dk_norm = (jnp.sum(part, axis=0) for part in of_weights)
    return dq, dk, dq_norm, dk_norm


def _sizes(N: int, K: int, H: int, config: Config) -> dict[str, Any]:
    heads, half = _power(max(N, K)), _power(H // 2)
    tokens = max(1, config.tile // (heads * 2 * half))
    warps = max(1, min(16, tokens * heads * 2 * half // (32 * config.each)))
    return {"N": N, "K": K, "H": H, "Q_HEADS": _power(N), "K_HEADS": _power(K), "HALF": half,
            "TOKENS": tokens, "num_warps": warps}  # fmt: skip


def _power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()
