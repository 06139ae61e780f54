"""Step 3, FlashAttention 2 (arXiv 2307.08691): queries outside, keys inside.

A block of the grid makes 64 rows of one head and sees all keys in turn, so its sums never leave the
registers, they are divided by their total once at the end, and there are T / 64 times as many
blocks to fill the chip with. Keys and values are read once a block of rows, T / 64 times in all,
mostly from the L2 cache. They come through a ring of two slots, ahead of the products; but the one
warpgroup waits for each product, and then the tensor cores wait for its softmax.
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
from pallas_kernels.matmul.tiles import SWIZZLED
from pallas_kernels.mma import add_product, laid_out, product_with_transposed

BLOCK_Q, BLOCK_KV, SLOTS = 64, 64, 2


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v of 16-bit floats; T and S multiples of 64."""
    check(q, k, v, BLOCK_Q, BLOCK_KV)
    (B, T, N, H), S = q.shape, k.shape[1]
    unit = H**-0.5 * LOG2E

    def kernel(q_gmem, k_gmem, v_gmem, out_gmem, q_smem, k_smem, v_smem, here, arrived):
        batch, n = lax.axis_index("batch"), lax.axis_index("head")
        queries = (batch, pl.ds(lax.axis_index("rows") * BLOCK_Q, BLOCK_Q), n)
        plgpu.copy_gmem_to_smem(q_gmem.at[queries], q_smem, here.at[0])

        def fetch(j):
            slot, keys = lax.rem(j, SLOTS), (batch, pl.ds(j * BLOCK_KV, BLOCK_KV), n)
            plgpu.copy_gmem_to_smem(k_gmem.at[keys], k_smem.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(v_gmem.at[keys], v_smem.at[slot], arrived.at[slot])

        for j in range(min(SLOTS, S // BLOCK_KV)):
            fetch(jnp.int32(j))
        plgpu.barrier_wait(here.at[0])

        def step(j, carry):
            out, top, total = carry
            slot = lax.rem(j, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            products = product_with_transposed(q_smem, k_smem.at[slot], interpret=interpret)
            weights, top, total, shrink = weigh(products, top, total, unit)
            out = times(out, shrink)
            out = add_product(out, weights.astype(q.dtype), v_smem.at[slot], interpret=interpret)
            pl.when(j + SLOTS < S // BLOCK_KV)(lambda: fetch(j + SLOTS))
            return out, top, total

        rows = (BLOCK_Q,)
        start = jnp.zeros((BLOCK_Q, H)), jnp.full(rows, -jnp.inf), jnp.zeros(rows)
        start = laid_out(*start, interpret=interpret)
        out, _, total = lax.fori_loop(0, S // BLOCK_KV, step, start)
        q_smem[...] = times(out, 1 / total).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, out_gmem.at[queries])
        plgpu.wait_smem_to_gmem(0)

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=SWIZZLED)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            smem(BLOCK_Q, H),
            smem(SLOTS, BLOCK_KV, H),
            smem(SLOTS, BLOCK_KV, H),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        ],
        grid=(T // BLOCK_Q, B, N),
        grid_names=("rows", "batch", "head"),
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )(q, k, v)
