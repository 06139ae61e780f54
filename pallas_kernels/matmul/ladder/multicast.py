"""Step 7, multicast: two blocks that need the same columns of b copy half of them each, for both.

The two blocks of a cluster run on neighbouring multiprocessors and make tiles one below the other.
The copy engine writes what it reads once into the shared memory of both: a third less is asked of
the L2 cache than by `persistent`.
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

TILE_M, TILE_N, STEP, SLOTS = 128, 128, 64, 4  # TILE_N: of each of the two warpgroups
BAND, CLUSTER = 8, 2


def matmul(a: Float[Array, "M K"], b: Float[Array, "K N"], *, interpret: Any = False) -> Array:
    """a @ b of 16-bit floats, summed in float32; M and N multiples of 256, K of 64."""
    (M, K), N = a.shape, b.shape[1]
    check(a, b, CLUSTER * TILE_M, 2 * TILE_N, STEP)
    tiles = (M // (CLUSTER * TILE_M), N // (2 * TILE_N))

    def pipeline(step, context):
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(K // STEP,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((TILE_M, STEP), lambda k: (0, k), transforms=SWIZZLED),
                plgpu.BlockSpec(
                    (STEP, 2 * TILE_N),
                    lambda k: (k, 0),
                    transforms=SWIZZLED,
                    collective_axes=("cluster",),
                ),
            ],
            max_concurrent_steps=SLOTS,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            compute_context=context,
        )

    def kernel(a_gmem, b_gmem, out_gmem, pieces):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * TILE_N, TILE_N)

        def step(_, a_smem, b_smem, acc):
            products = Products(acc, interpret=interpret)
            products.add(a_smem, b_smem.at[:, mine])
            products.wait()
            return acc

        def all_tiles(ring):
            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="clusters")
            def _(loop):
                m, n = plgpu.planar_snake(loop.index[0], tiles, 1, BAND)
                rows = pl.ds((m * CLUSTER + lax.axis_index("cluster")) * TILE_M, TILE_M)
                columns = pl.ds(n * 2 * TILE_N, 2 * TILE_N)

                def product(run_pipeline):
                    def hold(acc):
                        run_pipeline(acc)
                        return sums(acc)

                    acc = pl.run_scoped(hold, _compat.Accumulator((TILE_M, TILE_N), jnp.float32))
                    store(acc, pieces.at[warpgroup], out_gmem.at[rows, columns].at[:, mine])

                pipeline(step, product)(a_gmem.at[rows, :], b_gmem.at[:, columns], allocations=ring)

        ring = pipeline(step, lambda _: None).get_allocations(a_gmem, b_gmem)
        pl.run_scoped(all_tiles, ring, collective_axes="warpgroup")
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), a.dtype),
        scratch_types=[plgpu.SMEM((2, 2, PIECE, PIECE), a.dtype, transforms=SWIZZLED)],
        grid=(max(1, _compat.multiprocessors(interpret) // CLUSTER),),
        grid_names=("clusters",),
        cluster=(CLUSTER,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(a, b)
