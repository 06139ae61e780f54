"""Rounding one matrix to 8 or 4 bits: the scheme, its scales, round to nearest.

A scale is the largest magnitude of its group over 127.5, 7.5 or 448 (float8_e4m3fn), rounded to the
bfloat16 that loaders keep it in before anything is divided by it. Values are what is nearest: a
weight is off by half a step at most, the largest of a group at 8 bits by one (what its scale lost).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from jaxinfra.errors import UserError
from jaxinfra.model.quantized import QuantizedMatrix
from pallas_kernels.quantised_matmul.formats import pack


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How weights are kept: `bits`, and inputs a scale (`group`; None: one scale an output)."""

    bits: int = 8
    group: int | None = None
    float8: bool = False  # float8_e4m3fn in place of int8

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise UserError(f"quantize: bits={self.bits}; give 8 or 4")
        if self.float8 and (self.bits != 8 or self.group is not None):
            raise UserError("quantize: float8 has 8 bits and one scale an output; leave out group")
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise UserError(f"quantize: group={self.group}; give an even number, such as 128")

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest value."""
        if self.float8:
            return -448, 448
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def width(self, inputs: int) -> int:
        """Inputs a scale, of a matrix of `inputs`; UserError where they cannot be parted so."""
        if self.bits == 4 and inputs % 8:
            raise UserError(
                f"quantize: a matrix of {inputs} inputs: 4 bits need a multiple of 8; use --bits 8"
            )
        if self.bits == 8 and inputs % 4:
            raise UserError(f"quantize: a matrix of {inputs} inputs: not a multiple of 4")
        width = self.group or inputs
        if inputs % width:
            fits = [str(n) for n in (256, 128, 64, 32, 16, 8) if inputs % n == 0]
            raise UserError(
                f"quantize: group={width} does not divide the {inputs} inputs of a matrix; "
                f"give one that does, such as {', '.join(fits)}"
            )
        return width


def default_group(*inputs: int) -> int:
    """128, or the largest power of two below that divides the `inputs` of every matrix."""
    return next(n for n in (128, 64, 32, 16, 8, 4, 2, 1) if not any(i % n for i in inputs))


def parted(w: Float[Array, "o i"], width: int) -> Float[Array, "g o n"]:
    """The matrix with its inputs in groups of `width`, groups first."""
    return jnp.swapaxes(w.reshape(w.shape[0], -1, width), 0, 1)


def scales_of(groups: Float[Array, "... n"], scheme: Scheme) -> Float[Array, ...]:
    """The scale of each group; 1 where all of it is zero."""
    most = scheme.limits[1] + (0 if scheme.float8 else 0.5)
    return stored_scale(jnp.max(jnp.abs(groups), axis=-1) * np.float32(1 / most))


def stored_scale(scales: Float[Array, ...]) -> Float[Array, ...]:
    """What is left of the scales in bfloat16; 1 where that is zero."""
    scales = scales.astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.where(scales > 0, scales, jnp.float32(1))


def values_of(
    groups: Float[Array, "... n"], scales: Float[Array, ...], scheme: Scheme
) -> Float[Array, "... n"]:
    """The nearest value of each weight, as floats."""
    least, most = scheme.limits
    steps = groups / scales[..., None]
    if scheme.float8:
        return jnp.clip(steps, least, most).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.clip(jnp.round(steps), least, most)


def assembled(
    values: Float[Array, "g o n"], scales: Float[Array, "g o"], scheme: Scheme, shape: tuple
) -> QuantizedMatrix:
    """Values and scales in the types that they are kept in."""
    if scheme.float8:
        kept: Any = values.astype(jnp.float8_e4m3fn)
    else:
        kept = values.astype(jnp.int8)
        kept = pack(kept) if scheme.bits == 4 else kept
    return QuantizedMatrix(kept, scales, shape=shape)


def round_to_nearest(w: Float[Array, "o i"], scheme: Scheme, shape: tuple) -> QuantizedMatrix:
    """The matrix [o, i] rounded; `shape` is that of its array in Params, layers apart."""
    groups = parted(w.astype(jnp.float32), scheme.width(w.shape[1]))
    scales = scales_of(groups, scheme)
    return assembled(values_of(groups, scales, scheme), scales, scheme, shape)


def stored_float(x: Any) -> Any:
    """What is left in bfloat16, in which arrays that are not quantised are written."""
    if isinstance(x, jax.Array):
        return x.astype(jnp.bfloat16).astype(jnp.float32)
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)
