"""A matrix in 8 or 4 bits that stands where `Params` and `project` have one of floats.

W[o, i] = values[o, i] * scale of the output and of the group of inputs that i is in. Groups come
first in memory, [g, o, n], so that a product with each is one batched product; a matrix with a
scale an output has one group.

Cost of a token: one byte a weight (half a byte packed) in place of two or four. XLA:CPU has no
product of floats with integers: it writes the converted matrix out, 3 times slower than a float32
product out of the cache, and the multiply-and-sum form is no better. It has a fast product of int8
with int8 for two rows and more, so each row of x becomes two rows of int8, what was rounded off in
the second: together 15 bits, and float32's accuracy of a product with int8 weights within 2e-5 of
its largest term. Measured on two busy AVX-512 cores, one row times [3072, 576] in the cache, best
of half a second: two rows of int8 94 us, float32 86 us, converted weights 267 us, float
multiply-and-sum 4,800 us (234 us in blocks of 16), int8 multiply-and-sum 400 us, one row of int8
250 us. Out of the memory, where float32 is bound by its bytes, this form is the faster one: the
four products of a layer of SmolLM2-135M take 733 us against float32's 1,021 (tenth percentile of
1,560 turns; the machine was overloaded), but 1,278 us in groups of 64, which have so many sums.

    jaxinfra quantize smollm2-135m out --bits 8
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxinfra.model import matrix_first
from pallas_kernels import weight_matmul
from pallas_kernels.quantised_matmul.formats import unpack

# Rows up to which groups of int8 are multiplied one by one on a CPU; beyond, the matrix of floats
# that is written out first costs less than the sums of every group.
FEW_ROWS = 2


@struct.dataclass
class QuantizedMatrix:
    """A matrix [o, i], or L stacked ones, with scales for groups of n = i / g inputs.

    `values` uint8 hold two numbers of 4 bits a byte, the earlier one low, each plus 8.
    """

    values: Any  # [*L, g, o, n] int8 or float8_e4m3fn, or [*L, g, o, n / 2] uint8
    scales: Any  # [*L, g, o] float32
    shape: tuple[int, ...] = struct.field(pytree_node=False)  # [in.., out..] in Params, no L

    @property
    def inputs(self) -> int:
        """i, how many inputs it has."""
        return math.prod(self.shape) // self.scales.shape[-1]


def is_quantized(leaf: Any) -> bool:
    """Whether `leaf` is a quantised matrix: for `is_leaf` of tree functions."""
    return isinstance(leaf, QuantizedMatrix)


def integers(w: QuantizedMatrix) -> QuantizedMatrix:
    """`w` with a value a byte."""
    return dataclasses.replace(w, values=unpack(w.values)) if w.values.dtype == jnp.uint8 else w


def for_decoding(w: QuantizedMatrix) -> QuantizedMatrix:
    """`w` as this backend multiplies it fastest: a CPU takes twice as long to unpack a byte as to
    multiply what is in it, so there 4 bits take a byte while they are in use."""
    return integers(w) if jax.default_backend() == "cpu" else w


def dequantize(w: QuantizedMatrix) -> Float[Array, "*L o i"]:
    """The float32 matrix that `w` stands for: each value times its scale, rounded once."""
    floats = integers(w).values.astype(jnp.float32) * w.scales[..., None]
    *lead, g, o, n = floats.shape
    return jnp.swapaxes(floats, -3, -2).reshape(*lead, o, g * n)


def dense(tree: Any, dtype: Any) -> Any:
    """The tree with every quantised matrix as the array of `Params` that it stands for."""

    def one(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        matrix = jnp.swapaxes(dequantize(leaf), -1, -2)
        return matrix.reshape(*matrix.shape[:-2], *leaf.shape).astype(dtype)

    return jax.tree.map(one, tree, is_leaf=is_quantized)


def concatenate(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """One matrix with the outputs of all: they have the same inputs, groups and kind of values."""
    values = jnp.concatenate([w.values for w in matrices], axis=-2)
    scales = jnp.concatenate([w.scales for w in matrices], axis=-1)
    return QuantizedMatrix(values, scales, shape=(matrices[0].inputs, scales.shape[-1]))


def product(x: Float[Array, "B T i"], w: QuantizedMatrix, dtype: Any) -> Float[Array, "B T o"]:
    """x times the transpose of `w`, in `dtype`; sums in float32 or exact."""
    rows = x.reshape(-1, x.shape[-1])
    backend = jax.default_backend()
    if backend == "gpu" and rows.shape[0] == 1:
        y = _along_memory(rows, w)
    elif backend == "cpu" and _worth_integers(rows.shape[0], w):
        y = _by_integers(rows, integers(w))
    elif backend == "gpu" and w.values.dtype != jnp.float8_e4m3fn:
        y = weight_matmul(rows, w.values, w.scales, dtype=dtype)
    else:
        matrix = dequantize(w).astype(x.dtype)
        y = matrix_first.product(rows, matrix, jnp.float32)
    return y.reshape(*x.shape[:2], -1).astype(dtype)


def _worth_integers(rows: int, w: QuantizedMatrix) -> bool:
    one_scale = w.values.shape[-3] == 1
    return w.values.dtype != jnp.float8_e4m3fn and (one_scale or rows <= FEW_ROWS)


def _along_memory(x: Float[Array, "1 i"], w: QuantizedMatrix) -> Float[Array, "1 o"]:
    """One row by a multiply and a sum, into which XLA:GPU fuses conversion and unpacking."""
    groups = x.astype(jnp.float32).reshape(w.values.shape[-3], 1, -1)
    if w.values.dtype == jnp.uint8:
        low, high = (w.values & 15).astype(jnp.float32), (w.values >> 4).astype(jnp.float32)
        products = groups[..., ::2] * (low - 8) + groups[..., 1::2] * (high - 8)
    else:
        products = groups * w.values.astype(jnp.float32)
    return jnp.sum(products * w.scales[..., None], axis=(0, 2))[None]


def _by_integers(x: Float[Array, "r i"], w: QuantizedMatrix) -> Float[Array, "r o"]:
    """Products of int8, exact, of x in two parts: 127 steps of its largest, and 254 of each."""
    g, _, n = w.values.shape
    r = x.shape[0]
    x = jnp.swapaxes(x.astype(jnp.float32).reshape(r, g, n), 0, 1)
    step = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-30) / 127
    steps = x / step[..., None]
    coarse = jnp.round(steps)
    parts = jnp.concatenate([coarse, jnp.round((steps - coarse) * 254)], axis=1).astype(jnp.int8)
    if g == 1:
        sums = matrix_first.product(parts[0], w.values[0], jnp.int32)[None]
    else:
        sums = jnp.einsum("gpn,gon->gpo", parts, w.values, preferred_element_type=jnp.int32)
    sums = sums.astype(jnp.float32)
    sums = (sums[:, :r] + sums[:, r:] / 254) * step[..., None] * w.scales[:, None]
    return jnp.sum(sums, axis=0)
