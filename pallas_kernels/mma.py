"""Tensor-core products that the race detector sees, and sums that are read when they are there."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _compat

# Registers a thread, by how many warpgroups multiply: of the one that copies, and of each of these.
# A block that asks for more than there are waits for ever.
REGISTERS = {1: (24, 240), 2: (24, 240), 3: (32, 160)}


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


def laid_out(values: Float[Array, "m n"], *rows: Float[Array, " m"], interpret: Any) -> tuple:
    """Values as the tensor cores hold sums, and numbers a row beside them: a loop's first."""
    if interpret:
        return values, *rows
    of_rows = plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(values, plgpu.Layout.WGMMA),
        *(plgpu.layout_cast(row, of_rows) for row in rows),
    )


def product_with_transposed(a: Any, b: Any, *, interpret: Any) -> Float[Array, "m n"]:
    """a @ b^T, waited for; a [m, k] and b [n, k] lie in shared memory."""
    if interpret:  # jax 0.10 interprets no transposed reference
        product = jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32).T)
        plgpu.commit_smem()
        return product

    def run(acc):
        plgpu.wgmma(acc, a, b.T)
        return sums(acc)

    return pl.run_scoped(run, _compat.Accumulator((a.shape[0], b.shape[0]), jnp.float32))


def add_product(
    values: Float[Array, "m n"], a: Float[Array, "m k"], b: Any, *, interpret: Any
) -> Float[Array, "m n"]:
    """values + a @ b, waited for; a in registers, b [k, n] in shared memory.

    No interpreter takes such an a: interpreted, the product is one of values.
    """
    if interpret:
        product = jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
        plgpu.commit_smem()
        return values + product
    run = pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))
    return lax.optimization_barrier(run(_compat.Accumulator.init(values)))
