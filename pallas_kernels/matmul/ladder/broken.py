"""A ring of two slots with one of four mistakes planted, each of which the race detector sees.

On the chip all four may give the right answer for years. Without a mistake it is `pipelined` with
the ring's barriers written out: one warpgroup copies, one multiplies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _compat
from pallas_kernels.matmul.tiles import SWIZZLED, check
from pallas_kernels.mma import Products, sums

TILE, SLOTS = 64, 2
MISTAKES = {
    "multiplies early": "the products do not wait for the copies to arrive",
    "copies early": "a slot is written again without waiting for its release",
    "releases early": "a slot is released while products still read it",
    "stores early": "the copy out starts before the stores are committed",
}


def matmul(
    a: Float[Array, "64 K"], b: Float[Array, "K 64"], *, mistake: str = "", interpret: Any = False
) -> Array:
    """a @ b of 16-bit floats, summed in float32, for one tile; `mistake` is a key of MISTAKES."""
    (M, K), N = a.shape, b.shape[1]
    check(a, b, TILE, TILE, TILE)
    steps = K // TILE

    def kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem, arrived, free):
        @pl.when(lax.axis_index("warpgroup") == 1)
        def _copy():
            @pl.loop(0, steps)
            def _(k):
                slot, ks = lax.rem(k, SLOTS), pl.ds(k * TILE, TILE)
                if mistake != "copies early":

                    @pl.when(k >= SLOTS)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(a_gmem.at[:, ks], a_smem.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(b_gmem.at[ks, :], b_smem.at[slot], arrived.at[slot])

            if mistake != "copies early":

                @pl.loop(0, min(SLOTS, steps))
                def _(slot):
                    plgpu.barrier_wait(free.at[slot])

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _multiply():
            def hold(acc):
                @pl.loop(0, steps)
                def _(k):
                    slot, products = lax.rem(k, SLOTS), Products(acc, interpret=interpret)
                    if mistake != "multiplies early":
                        plgpu.barrier_wait(arrived.at[slot])
                    products.add(a_smem.at[slot], b_smem.at[slot])
                    if mistake != "releases early":
                        products.wait()
                    plgpu.barrier_arrive(free.at[slot])
                    products.wait()

                return sums(acc)

            acc = pl.run_scoped(hold, _compat.Accumulator((TILE, TILE), jnp.float32))
            out_smem[...] = acc.astype(out_smem.dtype)
            if mistake != "stores early":
                plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), a.dtype),
        scratch_types=[
            plgpu.SMEM((SLOTS, TILE, TILE), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((SLOTS, TILE, TILE), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((TILE, TILE), a.dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=1, num_barriers=SLOTS),
        ],
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(a, b)
