"""A product of a few rows and a matrix that lies as [out, in], as XLA:CPU does it best.

XLA:CPU hands products to YNNPACK, which wants the matrix first where rows are few: twelve pairs of
576 x 3,072 in float32 went at 20 GFLOP/s instead of 9 with 4 rows, 69 instead of 35 with 16, 123
instead of 93 with 64, and 118 instead of 124 with 256 (jax 0.10.2, two busy cores). By itself XLA
puts the rows first, to save turning a small result; the barrier stops it.

A row's bits are the same at every place among as many rows (seen for 2 to 128), not among more or
fewer: whoever needs that keeps to one shape, as the engine's `invariant` does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

MOST = 128  # rows


def product(x: Num[Array, "r i"], w: Num[Array, "o i"], dtype: Any) -> Num[Array, "r o"]:
    """x times the transpose of w; sums and result in `dtype`."""
    if jax.default_backend() != "cpu" or not 1 < x.shape[0] <= MOST:
        return jnp.einsum("ri,oi->ro", x, w, preferred_element_type=dtype)
    turned = jnp.einsum("oi,ri->or", w, x, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(turned).T
