"""Step 8, ping-pong: the two warpgroups work on different tiles and take turns at the tensor cores.

While one multiplies, the other stores its sums: the tensor cores never wait for an epilogue. Each
has a ring of its own, which the copying warpgroup fills tile by tile in the order of the turns. The
tiles are smaller (128 x 128), so more is asked of the L2 cache: it pays where K is short.
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
from pallas_kernels.matmul.ladder.tiled_epilogue import PIECE, store
from pallas_kernels.matmul.tiles import SWIZZLED, check
from pallas_kernels.mma import Products, sums

TILE, STEP, SLOTS = 128, 64, 3  # SLOTS: of each of the two rings
BAND = 8


def matmul(a: Float[Array, "M K"], b: Float[Array, "K N"], *, interpret: Any = False) -> Array:
    """a @ b of 16-bit floats, summed in float32; M and N multiples of 128, K of 64."""
    (M, K), N = a.shape, b.shape[1]
    check(a, b, TILE, TILE, STEP)
    tiles, blocks = (M // TILE, N // TILE), _compat.multiprocessors(interpret)
    count, steps = tiles[0] * tiles[1], K // STEP

    def kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, pieces, arrived, free, turn):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")

        def place(i):
            """Rows and columns of this block's tile number i."""
            m, n = plgpu.planar_snake(block + i * blocks, tiles, 1, BAND)
            return pl.ds(m * TILE, TILE), pl.ds(n * TILE, TILE)

        mine = (count - block + blocks - 1) // blocks  # tiles of this block

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _(i):
                rows, columns = place(i)
                ring = lax.rem(i, 2)

                @pl.loop(0, steps)
                def _(k):
                    done = lax.div(i, 2) * steps + k  # steps that this ring has had before
                    slot = ring * SLOTS + lax.rem(done, SLOTS)

                    @pl.when(done >= SLOTS)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    ks = pl.ds(k * STEP, STEP)
                    plgpu.copy_gmem_to_smem(a_gmem.at[rows, ks], a_smem.at[slot], arrived.at[slot])
                    plgpu.copy_gmem_to_smem(
                        b_gmem.at[ks, columns], b_smem.at[slot], arrived.at[slot]
                    )

            # The last releases are waited for too: this warpgroup may not leave before the others.
            @pl.loop(0, 2 * SLOTS)
            def _(slot):
                of_this_ring = lax.div(mine + 1 - lax.div(slot, SLOTS), 2) * steps

                @pl.when(lax.rem(slot, SLOTS) < of_this_ring)
                def _():
                    plgpu.barrier_wait(free.at[slot])

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, lax.div(mine - warpgroup + 1, 2))
            def _(j):
                i = 2 * j + warpgroup
                rows, columns = place(i)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(turn.at[warpgroup])

                def hold(acc):
                    @pl.loop(0, steps)
                    def _(k):
                        slot = warpgroup * SLOTS + lax.rem(j * steps + k, SLOTS)
                        plgpu.barrier_wait(arrived.at[slot])
                        products = Products(acc, interpret=interpret)
                        products.add(a_smem.at[slot], b_smem.at[slot])
                        products.wait()
                        plgpu.barrier_arrive(free.at[slot])

                    @pl.when(i + 1 < mine)
                    def _():
                        plgpu.barrier_arrive(turn.at[1 - warpgroup])

                    return sums(acc)

                acc = pl.run_scoped(hold, _compat.Accumulator((TILE, TILE), jnp.float32))
                store(acc, pieces.at[warpgroup], out_gmem.at[rows, columns])

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), a.dtype),
        scratch_types=[
            plgpu.SMEM((2 * SLOTS, TILE, STEP), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((2 * SLOTS, STEP, TILE), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((2, 2, PIECE, PIECE), a.dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=2, num_barriers=2 * SLOTS),
            plgpu.Barrier(num_arrivals=1, num_barriers=2 * SLOTS),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(a, b)
