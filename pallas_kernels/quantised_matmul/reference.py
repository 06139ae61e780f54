"""Products of quantised matrices as plain mathematics: the specification.

Cost: 2 M N K FLOPs, of matrices written out in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.quantised_matmul.formats import BLOCK, unpack


def fp8_matmul(
    a: Float[Array, "M K"],
    b: Float[Array, "N K"],
    a_scale: Float[Array, ""] | Float[Array, "M k"],
    b_scale: Float[Array, ""] | Float[Array, "n k"],
    dtype: Any,
) -> Float[Array, "M N"]:
    """a @ b^T of what values times scales stand for, every sum in float32, rounded once."""
    return _product(fp8_floats(a, a_scale, 1), fp8_floats(b, b_scale, BLOCK)).astype(dtype)


def fp8_floats(
    values: Float[Array, "R K"], scale: Float[Array, ""] | Float[Array, "r k"], rows: int
) -> Float[Array, "R K"]:
    """The float32 matrix: `rows` rows and 128 columns share a scale, or all do."""
    floats = values.astype(jnp.float32)
    if scale.ndim:
        scale = jnp.repeat(jnp.repeat(scale, rows, axis=0)[: len(values)], BLOCK, axis=1)
    return floats * scale


def weight_matmul(
    x: Float[Array, "M K"],
    values: Int8[Array, "g N n"] | UInt8[Array, "g N m"],
    scales: Float[Array, "g N"],
) -> Float[Array, "M N"]:
    """x times the transpose of the weights that values times scales stand for, as x's dtype."""
    return _product(x.astype(jnp.float32), weight_floats(values, scales)).astype(x.dtype)


def weight_floats(
    values: Int8[Array, "g N n"] | UInt8[Array, "g N m"], scales: Float[Array, "g N"]
) -> Float[Array, "N K"]:
    """The float32 matrix."""
    whole = unpack(values) if values.dtype == jnp.uint8 else values
    floats = whole.astype(jnp.float32) * scales[..., None].astype(jnp.float32)
    return jnp.swapaxes(floats, 0, 1).reshape(floats.shape[1], -1)


def _product(left: Float[Array, "M K"], right: Float[Array, "N K"]) -> Float[Array, "M N"]:
    return jnp.einsum("mk,nk->mn", left, right, precision=jax.lax.Precision.HIGHEST)
