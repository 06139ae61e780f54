"""Norms and rotation of heads on a TPU: blocks of positions pass through vector memory once.

Backward, the norms' gradients stay in vector memory from the first block to the last, which follow
one another. Positions past the last hold anything: they are not stored, and left out of those
gradients.

Not yet timed on a chip, and so never chosen unasked.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import shards

BLOCK = 2**16  # numbers of a block of q
LARGEST = 2**15


def refusal(*, platform: str, N: int, K: int, H: int) -> str | None:
    """Why these kernels cannot take such heads, or None if they can."""
    if platform != "tpu":
        return f"the TPU's kernels need a TPU, and arrays are on {platform}"
    if H % 128:
        return f"the kernels take a head width of a multiple of 128, not {H}"
    if max(N, K) * H > LARGEST:
        return f"the kernels take heads of {LARGEST} numbers in all, not {max(N, K)} of {H}"
    return shards.refusal()


def forward(
    q: Float[Array, "M N H"], k: Float[Array, "M K H"], cos: Float[Array, "M h"],
    sin: Float[Array, "M h"], weights: tuple[Float[Array, " H"], Float[Array, " H"]] | None,
    *, eps: float, plus_one: bool, block: int = BLOCK, interpret: Any = False,
) -> list[Array]:  # fmt: skip
    """q and k after norms, where there are weights, and rotation."""
    M = q.shape[0]
    tokens, of = _blocks(q, block)
    norms = [] if weights is None else [w[None] for w in weights]
    return pl.pallas_call(
        functools.partial(_forward, eps=eps, plus_one=plus_one),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)],
        grid=(pl.cdiv(M, tokens),),
        in_specs=[*map(of, (q, k, cos, sin)), *map(_whole, norms)],
        out_specs=[of(q), of(k)],
        name="norm_rope",
        interpret=interpret,
    )(q, k, cos, sin, *norms)


def _forward(q_ref, k_ref, cos_ref, sin_ref, *refs, eps: float, plus_one: bool):
    *norms, q_out, k_out = refs
    for i, (ref, out) in enumerate(((q_ref, q_out), (k_ref, k_out))):
        x = ref[...].astype(jnp.float32)
        if norms:
            x = x * _scale(x, eps) * _weight(norms[i], plus_one)
        out[...] = _turned(x, cos_ref[...], sin_ref[...]).astype(out.dtype)


def backward(
    q: Float[Array, "M N H"], k: Float[Array, "M K H"], q_slope: Float[Array, "M N H"],
    k_slope: Float[Array, "M K H"], cos: Float[Array, "M h"], sin: Float[Array, "M h"],
    weights: tuple[Float[Array, " H"], Float[Array, " H"]],
    *, eps: float, plus_one: bool, block: int = BLOCK, interpret: Any = False,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Gradients of q and k before their norms, and of both weights, float32."""
    M, _, H = q.shape
    tokens, of = _blocks(q, block)
    norms = [w[None] for w in weights]
    dweight = jax.ShapeDtypeStruct((1, H), jnp.float32)
    dq, dk, dq_norm, dk_norm = pl.pallas_call(
        functools.partial(_backward, M=M, eps=eps, plus_one=plus_one),
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)), dweight, dweight],
        grid=(pl.cdiv(M, tokens),),
        in_specs=[*map(of, (q, k, q_slope, k_slope, cos, sin)), *map(_whole, norms)],
        out_specs=[of(q), of(k), *map(_whole, norms)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="norm_rope_backward",
        interpret=interpret,
    )(q, k, q_slope, k_slope, cos, sin, *norms)
    return dq, dk, dq_norm[0], dk_norm[0]


def _backward(
    q_ref, k_ref, q_slope, k_slope, cos_ref, sin_ref, q_norm, k_norm, dq_ref, dk_ref, dq_norm,
    dk_norm, *, M, eps, plus_one,
):  # fmt: skip
    step, tokens = pl.program_id(0), q_ref.shape[0]
    for ref, slope_ref, norm, dx_ref, dnorm in (
        (q_ref, q_slope, q_norm, dq_ref, dq_norm), (k_ref, k_slope, k_norm, dk_ref, dk_norm)
    ):  # fmt: skip
        x, slope = ref[...].astype(jnp.float32), slope_ref[...].astype(jnp.float32)
        slope = _turned(slope, cos_ref[...], -sin_ref[...])
        scale = _scale(x, eps)
        normed = x * scale
        part, slope = slope * normed, slope * _weight(norm, plus_one)
        along = jnp.mean(slope * normed, axis=2, keepdims=True)
        dx_ref[...] = (scale * (slope - normed * along)).astype(dx_ref.dtype)
        if M % tokens:
            exist = step * tokens + lax.broadcasted_iota(jnp.int32, part.shape, 0) < M
            part = jnp.where(exist, part, 0.0)

        @pl.when(step == 0)
        def _start(dnorm=dnorm):
            dnorm[...] = jnp.zeros_like(dnorm)

        dnorm[...] += jnp.sum(part, axis=(0, 1))[None]


def _blocks(q: Array, block: int) -> tuple[int, Any]:
    """How many positions a block has, and where block i of an array lies."""
    M, N, H = q.shape
    tokens = min(max(block // (N * H) // 8, 1) * 8, M)
    return tokens, lambda x: pl.BlockSpec(
        (tokens, *x.shape[1:]), lambda i: (i, *[0] * (x.ndim - 1))
    )


def _whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda i: (0, 0))


def _turned(
    x: Float[Array, "m N H"], cos: Float[Array, "m h"], sin: Float[Array, "m h"]
) -> Float[Array, "m N H"]:
    low, high = jnp.split(x, 2, axis=2)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)


def _scale(x: Float[Array, "m N H"], eps: float) -> Float[Array, "m N 1"]:
    return lax.rsqrt(jnp.mean(x * x, axis=2, keepdims=True) + eps)


def _weight(ref: Any, plus_one: bool) -> Float[Array, "1 1 H"]:
    weight = ref[...].astype(jnp.float32)[None]
    return weight + 1.0 if plus_one else weight
