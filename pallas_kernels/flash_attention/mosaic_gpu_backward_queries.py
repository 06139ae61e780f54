"""The gradient of attention's queries on Hopper.

A warpgroup has `block_q` rows of one head and goes through the blocks of keys and values that they
see, which another one copies into a ring of slots each; the product of derivatives and keys is
under way while the next block is begun.

Cost: 6 H FLOPs for each visible pair of a query head and a key.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _compat
from pallas_kernels.flash_attention.mosaic_gpu_config import QueryConfig, Rule, sections
from pallas_kernels.flash_attention.sight import Sight
from pallas_kernels.matmul.tiles import SWIZZLED
from pallas_kernels.mma import REGISTERS, reads_end
from pallas_kernels.register_products import begin, loop, read, with_sums


def of_queries(
    rule: Rule,
    config: QueryConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    dout: Float[Array, "B T N H"],
    lse: Float[Array, "B N t"],
    delta: Float[Array, "B N t"],
    extra: dict[str, Array],
) -> Float[Array, "B T N H"]:
    """The gradient of q; `lse` in base 2, with `delta` long enough for whole tiles of rows.

    T and S are multiples of 8. `extra` holds what the call has of offset [B], window [1],
    q_segments and kv_segments, these long enough for whole tiles and blocks too.
    """
    c, interpret = config, rule.interpret
    B, T, N, H = q.shape
    G = N // k.shape[2]
    rows, shape = c.warpgroups * c.block_q, (c.block_q, c.block_kv)
    tiles, heads = -(-T // rows), B * N
    section = sections(heads, 2 * k.shape[1] * H * k.dtype.itemsize, G)
    names = list(extra)

    def kernel(*refs):
        q_gmem, k_gmem, v_gmem, dout_gmem, lse_gmem, delta_gmem, *given = refs[: 6 + len(names)]
        dq_gmem, q_smem, dout_smem, k_smem, v_smem, *barriers = refs[6 + len(names) :]
        mine_here, k_here, v_here, k_free, v_free = barriers
        of = dict(zip(names, given, strict=True))
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        part, place = lax.div(block, tiles * section), lax.rem(block, tiles * section)
        tile = lax.div(place, section)
        tile = tiles - 1 - tile if rule.causal else tile
        head = part * section + lax.rem(place, section)
        batch, n = lax.div(head, N), lax.rem(head, N)
        sight = Sight(
            causal=rule.causal,
            segmented="q_segments" in of,
            S=rule.S,
            block=c.block_kv,
            offset=of["offset"][batch] if "offset" in of else jnp.int32(0),
            window=of["window"][0] if "window" in of else None,
        )
        low, high = sight.blocks(tile * rows, rows)

        @pl.when(warpgroup == c.warpgroups)
        def _copy():
            plgpu.set_max_registers(REGISTERS[c.warpgroups][0], action="decrease")
            rings = (
                (k_gmem, k_smem, k_here, k_free, c.k_slots),
                (v_gmem, v_smem, v_here, v_free, c.v_slots),
            )

            @pl.loop(low, high)
            def _(j):
                keys = (batch, pl.ds(j * c.block_kv, c.block_kv), lax.div(n, G))
                for gmem, smem, here, free, slots in rings:
                    slot = lax.rem(j - low, slots)

                    @pl.when(j - low >= slots)
                    def _(free=free, slot=slot):
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(gmem.at[keys], smem.at[slot], here.at[slot])

            # The last releases are waited for too: this warpgroup may not leave before the others.
            for free, slots in ((ring[3], ring[4]) for ring in rings):

                @pl.loop(0, lax.min(high - low, slots))
                def _(slot, free=free):
                    plgpu.barrier_wait(free.at[slot])

        @pl.when(warpgroup < c.warpgroups)
        def _multiply():
            plgpu.set_max_registers(REGISTERS[c.warpgroups][1], action="increase")
            first = tile * rows + warpgroup * c.block_q
            queries, my_dout = q_smem.at[warpgroup], dout_smem.at[warpgroup]
            here = (batch, pl.ds(first, c.block_q), n)
            plgpu.copy_gmem_to_smem(q_gmem.at[here], queries, mine_here.at[warpgroup])
            plgpu.copy_gmem_to_smem(dout_gmem.at[here], my_dout, mine_here.at[warpgroup])

            def row(ref):
                part = ref.at[batch, n, pl.ds(first, c.block_q)]
                return _compat.load_plainly(part, interpret)

            my_lse, my_delta = row(lse_gmem), row(delta_gmem)

            def segments(name, start, count):
                if not sight.segmented:
                    return None
                return _compat.load_plainly(of[name].at[batch, pl.ds(start, count)], interpret)

            q_segments = segments("q_segments", first, c.block_q)
            plgpu.barrier_wait(mine_here.at[warpgroup])

            def release(ring, free, slots, done):
                slot = lax.rem(done, slots)
                reads_end(ring.at[slot], interpret=interpret)
                plgpu.barrier_arrive(free.at[slot])

            def add(dq, j, masked):
                """dq += derivatives by logits @ k: under way when the next block is begun."""
                k_slot, v_slot = lax.rem(j - low, c.k_slots), lax.rem(j - low, c.v_slots)

                def derivatives(logits, dp):
                    plgpu.barrier_wait(k_here.at[k_slot])
                    begin(logits, queries, k_smem.at[k_slot], transpose_b=True)
                    plgpu.barrier_wait(v_here.at[v_slot])
                    begin(dp, my_dout, v_smem.at[v_slot], transpose_b=True)
                    products = read(logits, 1)

                    @pl.when(j > low)
                    def _():
                        release(k_smem, k_free, c.k_slots, j - low - 1)

                    slope = rule.weights(products, my_lse, 0)[1]
                    if masked:
                        kv_segments = segments("kv_segments", j * c.block_kv, c.block_kv)
                        seen = sight.mask(shape, j, first, (q_segments, kv_segments), interpret)
                        slope = jnp.where(seen, slope, 0.0)
                    shift = lax.broadcast_in_dim(my_delta, shape, (0,))
                    result = (slope * (read(dp) - shift)).astype(q.dtype)
                    release(v_smem, v_free, c.v_slots, j - low)
                    return result

                ds = with_sums(derivatives, shape, shape, interpret=interpret)
                begin(dq, ds, k_smem.at[k_slot])

            def hold(dq):
                first_whole, end = sight.whole(first, c.block_q, low, high)
                if "window" in of or sight.segmented:
                    loop(low, first_whole, lambda j: add(dq, j, True), [dq])
                loop(first_whole, end, lambda j: add(dq, j, False), [dq])
                loop(end, high, lambda j: add(dq, j, True), [dq])
                return read(dq)

            total = with_sums(hold, (c.block_q, H), interpret=interpret)

            @pl.when(high > low)
            def _():
                release(k_smem, k_free, c.k_slots, high - low - 1)

            queries[...] = (total * rule.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(queries, dq_gmem.at[here])
            plgpu.wait_smem_to_gmem(0)

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=SWIZZLED)

    def barriers(count, arrivals=1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            smem(c.warpgroups, c.block_q, H),
            smem(c.warpgroups, c.block_q, H),
            smem(c.k_slots, c.block_kv, H),
            smem(c.v_slots, c.block_kv, H),
            barriers(c.warpgroups, 2),
            barriers(c.k_slots),
            barriers(c.v_slots),
            barriers(c.k_slots, c.warpgroups),
            barriers(c.v_slots, c.warpgroups),
        ],
        grid=(tiles * heads,),
        grid_names=("block",),
        num_threads=c.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )(q, k, v, dout, lse, delta, *extra.values())
