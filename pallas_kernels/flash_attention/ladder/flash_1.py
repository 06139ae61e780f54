"""Step 2, FlashAttention 1 (arXiv 2205.14135): the softmax goes along the keys, block by block.

A block of keys and values stays in shared memory while all queries of the head pass by. What a
query has so far, its output, its largest logit and its sum, lies in global memory between visits,
and every visit leaves the output normalised. Nothing of size [T, S] is written, but the sums go in
and out once a block of keys: S / 128 times 8 T (H + 2) bytes. A head is one block of the grid, so
few heads leave most of the chip idle, and nothing is copied while something is multiplied.
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
from pallas_kernels.flash_attention.ladder import check
from pallas_kernels.flash_attention.ladder.online_softmax import LOG2E, times, weigh
from pallas_kernels.matmul.tiles import SWIZZLED, SWIZZLED_32
from pallas_kernels.mma import add_product, laid_out, product_with_transposed

BLOCK_Q, BLOCK_KV = 64, 128


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v of 16-bit floats; T a multiple of 64, S of 128."""
    check(q, k, v, BLOCK_Q, BLOCK_KV)
    (B, T, N, H), S = q.shape, k.shape[1]
    unit = H**-0.5 * LOG2E

    def kernel(q_gmem, k_gmem, v_gmem, *refs):
        out_gmem, top_gmem, total_gmem, q_smem, k_smem, v_smem, *sums, keys_here, here = refs
        out_smem, top_smem, total_smem = sums
        batch, n = lax.axis_index("batch"), lax.axis_index("head")

        def places(i):
            rows = pl.ds(i * BLOCK_Q, BLOCK_Q)
            of_row = batch, n, rows
            return (batch, rows, n), (out_gmem, (batch, rows, n)), (top_gmem, of_row), (
                total_gmem, of_row
            )  # fmt: skip

        def store(i, out, top, total):
            out_smem[...], top_smem[...], total_smem[...] = out, top, total
            plgpu.commit_smem()
            for smem, (gmem, place) in zip(sums, places(i)[1:], strict=True):
                plgpu.copy_smem_to_gmem(smem, gmem.at[place])
            plgpu.wait_smem_to_gmem(0)

        @pl.loop(0, T // BLOCK_Q)
        def _(i):
            rows = (BLOCK_Q,)
            nothing = jnp.zeros((BLOCK_Q, H)), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
            store(i, *laid_out(*nothing, interpret=interpret))

        @pl.loop(0, S // BLOCK_KV)
        def _(j):
            keys = (batch, pl.ds(j * BLOCK_KV, BLOCK_KV), n)
            plgpu.copy_gmem_to_smem(k_gmem.at[keys], k_smem, keys_here.at[0])
            plgpu.copy_gmem_to_smem(v_gmem.at[keys], v_smem, keys_here.at[0])
            plgpu.barrier_wait(keys_here.at[0])

            @pl.loop(0, T // BLOCK_Q)
            def _(i):
                queries, *of_sums = places(i)
                plgpu.copy_gmem_to_smem(q_gmem.at[queries], q_smem, here.at[0])
                for smem, (gmem, place) in zip(sums, of_sums, strict=True):
                    plgpu.copy_gmem_to_smem(gmem.at[place], smem, here.at[0])
                plgpu.barrier_wait(here.at[0])
                products = product_with_transposed(q_smem, k_smem, interpret=interpret)
                top, before = (
                    _compat.load_plainly(smem, interpret) for smem in (top_smem, total_smem)
                )
                weights, top, total, shrink = weigh(products, top, before, unit)
                out = times(out_smem[...], before * shrink)
                out = add_product(out, weights.astype(q.dtype), v_smem, interpret=interpret)
                store(i, times(out, 1 / total), top, total)

    def rows_of(dtype, shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=SWIZZLED)

    out, _, _ = plgpu.kernel(
        kernel,
        out_type=[
            rows_of(jnp.float32, q.shape),
            rows_of(jnp.float32, (B, N, T)),
            rows_of(jnp.float32, (B, N, T)),
        ],
        scratch_types=[
            smem(BLOCK_Q, H),
            smem(BLOCK_KV, H),
            smem(BLOCK_KV, H),
            plgpu.SMEM((BLOCK_Q, H), jnp.float32, transforms=SWIZZLED_32),
            plgpu.SMEM((BLOCK_Q,), jnp.float32),
            plgpu.SMEM((BLOCK_Q,), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=1),
            plgpu.Barrier(num_arrivals=4, num_barriers=1),
        ],
        grid=(B, N),
        grid_names=("batch", "head"),
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )(q, k, v)
    return out.astype(q.dtype)
