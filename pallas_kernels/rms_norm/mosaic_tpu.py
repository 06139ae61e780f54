"""Norms of rows on a TPU: blocks of whole rows pass through vector memory once.

The pipeline that Pallas makes fetches the next rows while these are normed. Backward, the weight's
gradient stays in vector memory from the first block to the last, which follow one another. Rows
past the last hold anything, NaN included: they are not stored, and left out of that gradient.

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

BLOCK = 2**17  # numbers of a block: six of 2 MB at the most, in two slots, beside float32 ones
LONGEST = 2**14


def refusal(*, platform: str, D: int) -> str | None:
    """Why these kernels cannot norm such rows, or None if they can."""
    if platform != "tpu":
        return f"the TPU's kernels need a TPU, and arrays are on {platform}"
    if D > LONGEST:
        return f"the kernels take rows of up to {LONGEST}, not {D}"
    return shards.refusal()


def forward(
    x: Float[Array, "M D"], residual: Float[Array, "M D"] | None, weight: Float[Array, " D"],
    *, eps: float, plus_one: bool, block: int = BLOCK, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """x + residual (x where that is None), and the norm."""
    rows, across = _rows(x, block)
    inputs = [x] if residual is None else [x, residual]
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    made = pl.pallas_call(
        functools.partial(_forward, eps=eps, plus_one=plus_one),
        out_shape=[out] * len(inputs),
        grid=(pl.cdiv(x.shape[0], rows),),
        in_specs=[_whole(x), *[across] * len(inputs)],
        out_specs=[across] * len(inputs),
        name="rms_norm",
        interpret=interpret,
    )(weight[None], *inputs)
    return (x, *made) if residual is None else tuple(made)


def _forward(weight_ref, *refs, eps: float, plus_one: bool):
    x, out_ref = refs[0][...].astype(jnp.float32), refs[-1]
    if len(refs) == 4:
        total = (x + refs[1][...].astype(jnp.float32)).astype(out_ref.dtype)
        refs[2][...] = total
        x = total.astype(jnp.float32)
    out = x * _scale(x, eps) * _weight(weight_ref, plus_one)
    out_ref[...] = out.astype(out_ref.dtype)


def backward(
    total: Float[Array, "M D"], dtotal: Float[Array, "M D"], dout: Float[Array, "M D"],
    weight: Float[Array, " D"], *, eps: float, plus_one: bool, block: int = BLOCK,
    interpret: Any = False,
) -> tuple[Float[Array, "M D"], Float[Array, " D"]]:  # fmt: skip
    """Gradients of the normed rows, dtotal included, and of the weight, float32."""
    M, D = total.shape
    rows, across = _rows(total, block)
    dx, dweight = pl.pallas_call(
        functools.partial(_backward, M=M, eps=eps, plus_one=plus_one),
        out_shape=[
            jax.ShapeDtypeStruct(total.shape, total.dtype),
            jax.ShapeDtypeStruct((1, D), jnp.float32),
        ],
        grid=(pl.cdiv(M, rows),),
        in_specs=[_whole(total), across, across, across],
        out_specs=[across, _whole(total)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="rms_norm_backward",
        interpret=interpret,
    )(weight[None], total, dtotal, dout)
    return dx, dweight[0]


def _backward(
    weight_ref, total_ref, dtotal_ref, dout_ref, dx_ref, dweight_ref, *, M, eps, plus_one
):
    step, rows = pl.program_id(0), total_ref.shape[0]
    x, dtotal, dout = (ref[...].astype(jnp.float32) for ref in (total_ref, dtotal_ref, dout_ref))
    scale = _scale(x, eps)
    normed, slope = x * scale, dout * _weight(weight_ref, plus_one)
    along = jnp.mean(slope * normed, axis=1, keepdims=True)
    dx = dtotal + scale * (slope - normed * along)
    dx_ref[...] = dx.astype(dx_ref.dtype)
    part = dout * normed
    if M % rows:
        exist = step * rows + lax.broadcasted_iota(jnp.int32, part.shape, 0) < M
        part = jnp.where(exist, part, 0.0)

    @pl.when(step == 0)
    def _start():
        dweight_ref[...] = jnp.zeros_like(dweight_ref)

    dweight_ref[...] += jnp.sum(part, axis=0, keepdims=True)


def _rows(x: Array, block: int) -> tuple[int, pl.BlockSpec]:
    """How many rows a block has, and where block i lies."""
    M, D = x.shape
    rows = min(max(block // D // 16, 1) * 16, M)
    return rows, pl.BlockSpec((rows, D), lambda i: (i, 0))


def _whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec((1, x.shape[1]), lambda i: (0, 0))


def _scale(x: Float[Array, "m D"], eps: float) -> Float[Array, "m 1"]:
    return lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)


def _weight(ref: Any, plus_one: bool) -> Float[Array, "1 D"]:
    weight = ref[...].astype(jnp.float32)
    return weight + 1.0 if plus_one else weight
