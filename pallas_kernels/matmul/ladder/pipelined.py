"""Step 3, pipelined: the copies of later steps are under way while this one is multiplied.

A ring of four slots in shared memory: the warpgroup asks for what it needs four steps from now and
multiplies what has arrived. `emit_pipeline` writes the ring's barriers and waits.
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

TILE, STEP, SLOTS = 128, 64, 4


def matmul(a: Float[Array, "M K"], b: Float[Array, "K N"], *, interpret: Any = False) -> Array:
    """a @ b of 16-bit floats, summed in float32; M and N multiples of 128, K of 64."""
    (M, K), N = a.shape, b.shape[1]
    check(a, b, TILE, TILE, STEP)

    def kernel(a_gmem, b_gmem, out_gmem, out_smem):
        rows = pl.ds(lax.axis_index("m") * TILE, TILE)
        columns = pl.ds(lax.axis_index("n") * TILE, TILE)

        def product(acc):
            def step(_, a_smem, b_smem):
                products = Products(acc, interpret=interpret)
                products.add(a_smem, b_smem)
                products.wait()

            plgpu.emit_pipeline(
                step,
                grid=(K // STEP,),
                in_specs=[
                    plgpu.BlockSpec((TILE, STEP), lambda k: (0, k), transforms=SWIZZLED),
                    plgpu.BlockSpec((STEP, TILE), lambda k: (k, 0), transforms=SWIZZLED),
                ],
                max_concurrent_steps=SLOTS,
            )(a_gmem.at[rows, :], b_gmem.at[:, columns])
            return sums(acc)

        acc = pl.run_scoped(product, _compat.Accumulator((TILE, TILE), jnp.float32))
        out_smem[...] = acc.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), a.dtype),
        scratch_types=[plgpu.SMEM((TILE, TILE), a.dtype, transforms=SWIZZLED)],
        grid=(M // TILE, N // TILE),
        grid_names=("m", "n"),
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(a, b)
