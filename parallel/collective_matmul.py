"""Matrix products with their collective inside: each step's message runs under a product.

`all_gather(x) @ w` and `reduce_scatter(x @ w)` are what tensor parallelism with cut sequences does
before and after each block. Taken apart into n products, the message of the next step is issued
before the product of this one, so a scheduler can run both at once (Wang et al. 2023, "Overlap
communication with dependent computation via decomposition", ASPLOS).

Cost: the 2 B D F / n FLOPs a device and the (n-1)/n bytes of the plain pair, in n products and n-1
messages. Worth it where a product takes longer than a message: B/n rows over alpha, the chip's
FLOP/s over its link's bytes/s.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from parallel.mesh import ensure_varying, varying


def all_gather_matmul(
    x: Float[Array, "m D"], w: Float[Array, "D f"], axis: str
) -> Float[Array, "n_m f"]:
    """`all_gather(x) @ w` for rows x cut over `axis` and columns w of this device."""
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    x, w = ensure_varying((x, w), (axis,))
    m = x.shape[0]
    y = ensure_varying(jnp.zeros((n * m, w.shape[1]), x.dtype), varying(x) | varying(w))
    back = [(j, (j - 1) % n) for j in range(n)]
    for step in range(n):
        coming = jax.lax.ppermute(x, axis, back) if step < n - 1 else x
        y = jax.lax.dynamic_update_slice(y, x @ w, (((i + step) % n) * m, 0))
        x = coming
    return y


def matmul_reduce_scatter(
    x: Float[Array, "n_m f"], w: Float[Array, "f D"], axis: str
) -> Float[Array, "m D"]:
    """`reduce_scatter(x @ w)` for columns x and rows w of this device; it keeps its own rows.

    A sum goes round while the product that it will meet at the next device is being made there.
    """
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    x, w = ensure_varying((x, w), (axis,))
    m = x.shape[0] // n

    def product(part: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, part * m, m) @ w

    on = [(j, (j + 1) % n) for j in range(n)]
    total = product((i - 1) % n)
    for step in range(2, n + 1):
        moved = jax.lax.ppermute(total, axis, on)
        total = moved + product((i - step) % n)
    return total
