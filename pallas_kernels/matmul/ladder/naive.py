"""Step 1, naive: one 64 x 64 tile of the output a block, and every copy is waited for.

A block's only warpgroup asks the copy engine (TMA) for 64 columns of a and 64 rows of b, waits,
multiplies on the tensor cores, waits, and begins again: copies and products never overlap. Every
element of a is read N/64 times and every element of b M/64 times: 32 FLOPs a byte of traffic.
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

TILE, STEP = 64, 64


def matmul(a: Float[Array, "M K"], b: Float[Array, "K N"], *, interpret: Any = False) -> Array:
    """a @ b of 16-bit floats, summed in float32; M, N and K multiples of 64."""
    (M, K), N = a.shape, b.shape[1]
    check(a, b, TILE, TILE, STEP)

    def kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem, arrived):
        rows = pl.ds(lax.axis_index("m") * TILE, TILE)
        columns = pl.ds(lax.axis_index("n") * TILE, TILE)

        def product(acc):
            @pl.loop(0, K // STEP)
            def _(i):
                ks = pl.ds(i * STEP, STEP)
                plgpu.copy_gmem_to_smem(a_gmem.at[rows, ks], a_smem, arrived.at[0])
                plgpu.copy_gmem_to_smem(b_gmem.at[ks, columns], b_smem, arrived.at[0])
                plgpu.barrier_wait(arrived.at[0])
                products = Products(acc, interpret=interpret)
                products.add(a_smem, b_smem)
                products.wait()

            return sums(acc)

        acc = pl.run_scoped(product, _compat.Accumulator((TILE, TILE), jnp.float32))
        out_smem[...] = acc.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    tile = plgpu.SMEM((TILE, TILE), a.dtype, transforms=SWIZZLED)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), a.dtype),
        scratch_types=[tile, tile, tile, plgpu.Barrier(num_arrivals=2, num_barriers=1)],
        grid=(M // TILE, N // TILE),
        grid_names=("m", "n"),
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(a, b)
