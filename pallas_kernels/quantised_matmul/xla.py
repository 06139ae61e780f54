"""Products of quantised matrices by XLA, on any device.

Where 8-bit floats have one scale a tensor, their product is XLA's own, scaled after; with a scale a
block, and of integer weights, the matrices are written out as 16-bit floats first, unless XLA fuses
that into its product.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels.quantised_matmul import reference
from pallas_kernels.quantised_matmul.formats import BLOCK

_NT = (((1,), (1,)), ((), ()))  # [M, K] and [N, K]


def fp8_matmul(
    a: Float[Array, "M K"],
    b: Float[Array, "N K"],
    a_scale: Float[Array, ""] | Float[Array, "M k"],
    b_scale: Float[Array, ""] | Float[Array, "n k"],
    dtype: Any,
) -> Float[Array, "M N"]:
    """The specification's result, of operands that are rounded to `dtype` where blocks scale."""
    if a_scale.ndim:
        a = reference.fp8_floats(a, a_scale, 1).astype(dtype)
        b = reference.fp8_floats(b, b_scale, BLOCK).astype(dtype)
    out = lax.dot_general(a, b, _NT, preferred_element_type=jnp.float32)
    return (out if a_scale.ndim else out * (a_scale * b_scale)).astype(dtype)


def weight_matmul(
    x: Float[Array, "M K"],
    values: Int8[Array, "g N n"] | UInt8[Array, "g N m"],
    scales: Float[Array, "g N"],
    *,
    dtype: Any = None,
) -> Float[Array, "M N"]:
    """The specification's result in `dtype` or x's, of weights that are rounded to x's dtype."""
    w = reference.weight_floats(values, scales).astype(x.dtype)
    out = lax.dot_general(x, w, _NT, preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype)
