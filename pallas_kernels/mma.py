"""Tensor-core products that the race detector sees, and sums that are read when they are there."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Products:
    """Products into one accumulator that the tensor cores work on while the warpgroup goes on."""

    def __init__(self, acc: Any, *, interpret: Any) -> None:
        self._acc, self._interpret = acc, interpret
        self._under_way: list[Any] = []

    def add(self, a: Any, b: Any) -> None:
        """Begins acc += a @ b; a [m, k] and b [k, n] lie in shared memory."""
        plgpu.wgmma(self._acc, a, b)
        self._under_way += (a, b)

    def wait(self) -> None:
        """Waits until no product is under way."""
        plgpu.wgmma_wait(0)
        reads_end(*self._under_way, interpret=self._interpret)
        self._under_way.clear()


def reads_end(*operands: Any, interpret: Any) -> None:
    """Marks, for the race detector, that products which read these references have ended.

    Of `plgpu.wgmma` alone it sees no access: a buffer that has not arrived, or that is handed back
    while it is still read, would go unnoticed. So, interpreted, the operands are read where their
    products end. The commit after those reads keeps the next copy into the buffer, which a barrier
    orders, from being taken for a race.
    """
    if interpret and operands:
        for ref in operands:
            jnp.sum(ref[...].astype(jnp.float32))
        plgpu.commit_smem()


def sums(acc: Any) -> Float[Array, "m n"]:
    """The accumulator's values, after all products into it.

    Reading waits for the products, but nothing ties the values to that wait, so the compiler could
    move arithmetic before it; the barrier ties them.
    """
    return lax.optimization_barrier(acc[...])
