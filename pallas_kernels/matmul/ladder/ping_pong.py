"""Step 8, ping-pong: the two warpgroups work on different tiles and take turns at the tensor cores.

While one multiplies, the other stores its sums: the tensor cores never wait for an epilogue. With
only one to feed them, it must keep a product under way while it queues the next, so a slot is
handed back one step later. Both take from one ring, deep enough for the copies to keep ahead; two
rings of three slots were a fifth slower. Who waits for a barrier must wait for all its phases, so a
slot has a pair of barriers for each warpgroup. The tiles are smaller (128 x 128), so more is asked
of the L2 cache: it pays where K is short.
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
from pallas_kernels.mma import reads_end, sums

TILE, STEP, SLOTS = 128, 64, 6
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

        def slot_of(done):
            """The slot of this block's step number `done`, and the number of its barriers."""
            slot = lax.rem(done, SLOTS)
            return slot, slot + SLOTS * lax.rem(lax.div(done, steps), 2)

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _(i):
                rows, columns = place(i)

                @pl.loop(0, steps)
                def _(k):
                    done = i * steps + k
                    slot, barrier = slot_of(done)

                    @pl.when(done >= SLOTS)
                    def _():
                        plgpu.barrier_wait(free.at[slot_of(done - SLOTS)[1]])

                    ks = pl.ds(k * STEP, STEP)
                    here = arrived.at[barrier]
                    plgpu.copy_gmem_to_smem(a_gmem.at[rows, ks], a_smem.at[slot], here)
                    plgpu.copy_gmem_to_smem(b_gmem.at[ks, columns], b_smem.at[slot], here)

            # The last releases are waited for too: this warpgroup may not leave before the others.
            @pl.loop(lax.max(0, mine * steps - SLOTS), mine * steps)
            def _(done):
                plgpu.barrier_wait(free.at[slot_of(done)[1]])

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            def begin(acc, done):
                slot, barrier = slot_of(done)
                plgpu.barrier_wait(arrived.at[barrier])
                plgpu.wgmma(acc, a_smem.at[slot], b_smem.at[slot])

            def release(done):
                slot, barrier = slot_of(done)
                reads_end(a_smem.at[slot], b_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(free.at[barrier])

            @pl.loop(0, lax.div(mine - warpgroup + 1, 2))
            def _(j):
                i = 2 * j + warpgroup
                rows, columns = place(i)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(turn.at[warpgroup])

                def hold(acc):
                    begin(acc, i * steps)

                    @pl.loop(1, steps)
                    def _(k):
                        begin(acc, i * steps + k)
                        plgpu.wgmma_wait(1)
                        release(i * steps + k - 1)

                    @pl.when(i + 1 < mine)
                    def _():
                        plgpu.barrier_arrive(turn.at[1 - warpgroup])

                    plgpu.wgmma_wait(0)
                    release((i + 1) * steps - 1)
                    return sums(acc)

                acc = pl.run_scoped(hold, _compat.Accumulator((TILE, TILE), jnp.float32))
                store(acc, pieces.at[warpgroup], out_gmem.at[rows, columns])

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), a.dtype),
        scratch_types=[
            plgpu.SMEM((SLOTS, TILE, STEP), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((SLOTS, STEP, TILE), a.dtype, transforms=SWIZZLED),
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
