"""Step 4, warp-specialised: one warpgroup only copies, two only multiply.

The copying warpgroup runs ahead of the others as far as the ring's slots allow and gives most of
its registers away. The two that multiply hold 128 x 128 sums each, side by side in one 128 x 256
tile of the output: 85 FLOPs a byte of traffic, and no instruction of theirs is spent on copies.
Shared memory is the limit: the output tile's 64 KB leave room for three slots of 48 KB.
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

TILE_M, TILE_N, STEP, SLOTS = 128, 128, 64, 3  # TILE_N: of each of the two warpgroups


def matmul(a: Float[Array, "M K"], b: Float[Array, "K N"], *, interpret: Any = False) -> Array:
    """a @ b of 16-bit floats, summed in float32; M a multiple of 128, N of 256, K of 64."""
    (M, K), N = a.shape, b.shape[1]
    check(a, b, TILE_M, 2 * TILE_N, STEP)

    def kernel(a_gmem, b_gmem, out_gmem, out_smem):
        rows = pl.ds(lax.axis_index("m") * TILE_M, TILE_M)
        columns = pl.ds(lax.axis_index("n") * 2 * TILE_N, 2 * TILE_N)
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * TILE_N, TILE_N)

        def product(run_pipeline):
            def hold(acc):
                run_pipeline(acc)
                return sums(acc)

            acc = pl.run_scoped(hold, _compat.Accumulator((TILE_M, TILE_N), jnp.float32))
            out_smem[warpgroup] = acc.astype(out_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[rows, columns].at[:, mine])
            plgpu.wait_smem_to_gmem(0)

        def step(_, a_smem, b_smem, acc):
            products = Products(acc, interpret=interpret)
            products.add(a_smem, b_smem.at[:, mine])
            products.wait()
            return acc

        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(K // STEP,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((TILE_M, STEP), lambda k: (0, k), transforms=SWIZZLED),
                plgpu.BlockSpec((STEP, 2 * TILE_N), lambda k: (k, 0), transforms=SWIZZLED),
            ],
            max_concurrent_steps=SLOTS,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            compute_context=product,
        )(a_gmem.at[rows, :], b_gmem.at[:, columns])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), a.dtype),
        scratch_types=[plgpu.SMEM((2, TILE_M, TILE_N), a.dtype, transforms=SWIZZLED)],
        grid=(M // TILE_M, N // (2 * TILE_N)),
        grid_names=("m", "n"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(a, b)
