"""Tensor-core products that the race detector sees, and sums that are read when they are there."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Products:
    """Products into one accumulator that the tensor cores work on while the warpgroup goes on.

    Interpreted, the operands are read at the wait that ends a product: of `plgpu.wgmma` alone the
    race detector sees no access, and a buffer that has not arrived, or is handed back while it is
    still read, would go unnoticed. The commit after those reads keeps the next copy into the
    buffer, which a barrier orders, from being taken for a race.
    """

    def __init__(self, acc: Any, *, interpret: Any) -> None:
        self._acc, self._interpret = acc, interpret
        self._under_way: list[tuple[Any, Any]] = []

    def add(self, a: Any, b: Any) -> None:
        """Begins acc += a @ b; a [m, k] and b [k, n] lie in shared memory."""
        plgpu.wgmma(self._acc, a, b)
        self._under_way.append((a, b))

    def wait(self, left: int = 0) -> None:
        """Waits until no more than `left` products are under way."""
        plgpu.wgmma_wait(left)
        while len(self._under_way) > left:
            operands = self._under_way.pop(0)
            if self._interpret:
                for ref in operands:
                    jnp.sum(ref[...].astype(jnp.float32))
                plgpu.commit_smem()


def sums(acc: Any) -> Float[Array, "m n"]:
    """The accumulator's values, after all products into it.

    Reading waits for the products, but nothing ties the values to that wait, so the compiler could
    move arithmetic before it; the barrier ties them.
    """
    return lax.optimization_barrier(acc[...])
