"""The grouped product by XLA's ragged products, on any device; rows behind the last group are zero.

What XLA makes of a ragged product depends on the device: some of its compilers multiply all rows
by all matrices. Rows behind the last group are set to zero before, for they may hold NaN.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# x [M, K] and dy [M, N], ragged in the M that is summed over, give [G, K, N].
_SUMMED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    counts: Int[Array, " G"],
    *,
    transpose_w: bool = False,
) -> Float[Array, "M N"]:
    """The specification's result, summed in float32; with `transpose_w`, w is [G, N, K]."""
    w = jnp.swapaxes(w, 1, 2) if transpose_w else w
    out = lax.ragged_dot(
        _filled(x, counts), w, counts.astype(jnp.int32), preferred_element_type=jnp.float32
    )
    return _filled(out, counts).astype(x.dtype)


def wgrad(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], counts: Int[Array, " G"]
) -> Float[Array, "G K N"]:
    """x_g^T dy_g of each group's rows, summed in float32."""
    sums = lax.ragged_dot_general(
        _filled(x, counts), _filled(dy, counts), counts.astype(jnp.int32), _SUMMED,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return sums.astype(x.dtype)


def _filled(rows: Float[Array, "M n"], counts: Int[Array, " G"]) -> Float[Array, "M n"]:
    """Zeros behind the last group."""
    inside = jnp.arange(rows.shape[0])[:, None] < jnp.sum(counts)
    return jnp.where(inside, rows, jnp.zeros((), rows.dtype))
