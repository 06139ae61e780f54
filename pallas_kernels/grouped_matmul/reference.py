"""The grouped product as plain mathematics: the specification.

Cost: 2 G M K N FLOPs, G times those of an implementation: every group multiplies all rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "G K N"], counts: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """Row r times the matrix of its group: the first counts[0] rows are group 0's, and so on.

    Rows behind the last group give zeros, whatever they hold. Summed in float32, rounded once.
    """
    ends = jnp.cumsum(counts)
    rows = jnp.arange(x.shape[0])[:, None]
    out = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    for g in range(w.shape[0]):
        mine = (ends[g] - counts[g] <= rows) & (rows < ends[g])
        left = jnp.where(mine, x, 0).astype(jnp.float32)
        product = jnp.matmul(left, w[g].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        out = jnp.where(mine, product, out)
    return out.astype(x.dtype)
