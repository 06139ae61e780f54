"""Step 4, FlashAttention 3 (arXiv 2407.08608): somebody copies, and no softmax is waited for.

One warpgroup copies keys and values into a ring and gives its registers to two that multiply. These
take turns at the tensor cores (ping-pong): while one queues its products, the other makes its
softmax. And each has products under its own softmax: q k^T of the next keys and weights v of the
last ones are queued together, and the softmax begins when the first is there. The price is a second
block of logits in registers and one more rescaling on the way from product to product.
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
from pallas_kernels.mma import REGISTERS, laid_out, reads_end
from pallas_kernels.register_products import begin, loop, read, with_sums, write

WARPGROUPS, BLOCK_Q, BLOCK_KV, SLOTS = 2, 64, 128, 2


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v of 16-bit floats; T and S multiples of 128."""
    rows = WARPGROUPS * BLOCK_Q
    check(q, k, v, rows, BLOCK_KV)
    (B, T, N, H), steps = q.shape, k.shape[1] // BLOCK_KV
    unit = H**-0.5 * LOG2E

    def kernel(q_gmem, k_gmem, v_gmem, out_gmem, q_smem, k_smem, v_smem, q_here, *barriers):
        k_here, v_here, k_free, v_free, turn = barriers
        batch, n = lax.axis_index("batch"), lax.axis_index("head")
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def _copy():
            plgpu.set_max_registers(REGISTERS[WARPGROUPS][0], action="decrease")

            @pl.loop(0, steps)
            def _(j):
                slot, keys = lax.rem(j, SLOTS), (batch, pl.ds(j * BLOCK_KV, BLOCK_KV), n)
                for gmem, smem, here, free in (
                    (k_gmem, k_smem, k_here, k_free),
                    (v_gmem, v_smem, v_here, v_free),
                ):

                    @pl.when(j >= SLOTS)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(gmem.at[keys], smem.at[slot], here.at[slot])

            # The last releases are waited for too: this warpgroup may not leave before the others.
            @pl.loop(0, min(steps, SLOTS))
            def _(slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(REGISTERS[WARPGROUPS][1], action="increase")
            first = lax.axis_index("rows") * rows + warpgroup * BLOCK_Q
            queries, mine = (batch, pl.ds(first, BLOCK_Q), n), q_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_gmem.at[queries], mine, q_here.at[warpgroup])
            plgpu.barrier_wait(q_here.at[warpgroup])
            pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))  # the first's turn

            def in_turn(queue):
                plgpu.barrier_wait(turn.at[warpgroup])
                queue()
                plgpu.barrier_arrive(turn.at[1 - warpgroup])

            def release(smem, free, slot):
                reads_end(smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(free.at[slot])

            def products_with(slot, queue_more=lambda: None, under_way=0):
                def run(products):
                    plgpu.barrier_wait(k_here.at[slot])

                    def queue():
                        begin(products, mine, k_smem.at[slot], transpose_b=True)
                        queue_more()

                    in_turn(queue)
                    return read(products, under_way)

                found = with_sums(run, (BLOCK_Q, BLOCK_KV), interpret=interpret)
                release(k_smem, k_free, slot)
                return found

            def tile(out):
                empty = jnp.full((BLOCK_Q,), -jnp.inf), jnp.zeros((BLOCK_Q,))
                _, top, total = laid_out(jnp.zeros((BLOCK_Q, H)), *empty, interpret=interpret)
                weights, *sums, _ = weigh(products_with(0), top, total, unit)

                def step(j, top, total, weights):
                    slot, last = lax.rem(j, SLOTS), lax.rem(j - 1, SLOTS)
                    plgpu.barrier_wait(v_here.at[last])
                    values = v_smem.at[last]
                    products = products_with(slot, lambda: begin(out, weights, values), 1)
                    new, top, total, shrink = weigh(products, top, total, unit)
                    made = read(out)
                    release(v_smem, v_free, last)
                    write(out, times(made, shrink))
                    return top, total, new.astype(q.dtype)

                carry = loop(1, steps, step, [out], *sums, weights.astype(q.dtype))
                _, total, weights = carry
                last = (steps - 1) % SLOTS
                plgpu.barrier_wait(v_here.at[last])
                in_turn(lambda: begin(out, weights, v_smem.at[last]))
                made = read(out)
                release(v_smem, v_free, last)
                return made, total

            made, total = with_sums(tile, (BLOCK_Q, H), interpret=interpret)
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))  # nobody's turn is left
            mine[...] = times(made, 1 / total).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_gmem.at[queries])
            plgpu.wait_smem_to_gmem(0)

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=SWIZZLED)

    def barriers(count, arrivals=1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            smem(WARPGROUPS, BLOCK_Q, H),
            smem(SLOTS, BLOCK_KV, H),
            smem(SLOTS, BLOCK_KV, H),
            barriers(WARPGROUPS),
            barriers(SLOTS),
            barriers(SLOTS),
            barriers(SLOTS, WARPGROUPS),
            barriers(SLOTS, WARPGROUPS),
            barriers(2),
        ],
        grid=(T // rows, B, N),
        grid_names=("rows", "batch", "head"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )(q, k, v)
