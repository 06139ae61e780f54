"""Gradients of attention's keys and values on Hopper, summed over the heads that share them.

A block makes rows of dk and dv of one key head and goes through the blocks of queries that see
them, of one query head of the group after the other. Where registers hold both sums, every
warpgroup has rows of its own. Of wide heads they do not: there two warpgroups `share` their rows,
one makes weights and dv, hands the weights over through shared memory, and the other makes dk.

Each has the products of a block of queries under way while it begins the next. Cost: 8 H FLOPs for
each visible pair of a query head and a key.
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
from pallas_kernels.flash_attention.mosaic_gpu_config import KeyConfig, Rule, sections
from pallas_kernels.flash_attention.seen_by import SeenBy
from pallas_kernels.matmul.tiles import SWIZZLED, SWIZZLED_32
from pallas_kernels.mma import REGISTERS, reads_end
from pallas_kernels.register_products import begin, loop, read, with_sums


def of_keys(
    rule: Rule,
    config: KeyConfig,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    dout: Float[Array, "B T N H"],
    lse: Float[Array, "B N t"],
    delta: Float[Array, "B N t"],
    extra: dict[str, Array],
) -> list[Array]:
    """The gradients of k and v; arguments as those of `mosaic_gpu_backward_queries.of_queries`.

    Where the config says `fused`, the gradient of q comes after them, without the scale and in
    float32: the key tiles add their parts in global memory, in no order.
    """
    c, interpret = config, rule.interpret
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G, rows, shape = N // K, c.groups * c.block_kv, (c.block_kv, c.block_q)
    tiles, heads = -(-S // rows), B * K
    section = sections(heads, 2 * G * T * H * q.dtype.itemsize)
    names = list(extra)
    parts = H // 64  # of dq's columns: what one warpgroup makes at a time

    def kernel(*refs):
        given, (dk_gmem, dv_gmem, *scratch) = refs[: len(arguments)], refs[len(arguments) :]
        q_gmem, k_gmem, v_gmem, dout_gmem, lse_gmem, delta_gmem, *given = given
        k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, *barriers = scratch
        mine_here, q_here, dout_here, free, *handed_over = barriers
        if c.fused:
            dq_gmem, (ds_smem, dq_smem, ds_here, keys_read) = given[-1], handed_over
        of = dict(zip(names, given, strict=False))
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        part, place = lax.div(block, tiles * section), lax.rem(block, tiles * section)
        tile, head = lax.div(place, section), part * section + lax.rem(place, section)
        batch, kv_head = lax.div(head, K), lax.rem(head, K)
        sight = SeenBy(
            causal=rule.causal,
            segmented="q_segments" in of,
            T=T,
            block=c.block_q,
            offset=of["offset"][batch] if "offset" in of else jnp.int32(0),
            window=of["window"][0] if "window" in of else None,
        )
        low, high = sight.blocks(tile * rows, rows)
        count = high - low

        @pl.when(warpgroup == c.warpgroups)
        def _copy():
            plgpu.set_max_registers(REGISTERS[c.warpgroups][0], action="decrease")

            @pl.loop(0, G)
            def _(g):
                n = kv_head * G + g

                @pl.loop(low, high)
                def _(j):
                    done = g * count + j - low
                    slot, span = lax.rem(done, c.slots), pl.ds(j * c.block_q, c.block_q)

                    @pl.when(done >= c.slots)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    for gmem, smem, statistic, statistic_smem, here in (
                        (q_gmem, q_smem, lse_gmem, lse_smem, q_here),
                        (dout_gmem, dout_smem, delta_gmem, delta_smem, dout_here),
                    ):
                        plgpu.copy_gmem_to_smem(
                            gmem.at[batch, span, n], smem.at[slot], here.at[slot]
                        )
                        plgpu.copy_gmem_to_smem(
                            statistic.at[batch, n, span], statistic_smem.at[slot], here.at[slot]
                        )

            # The last releases are waited for too: this warpgroup may not leave before the others.
            @pl.loop(0, lax.min(G * count, c.slots))
            def _(slot):
                plgpu.barrier_wait(free.at[slot])

        @pl.when(warpgroup < c.warpgroups)
        def _multiply():
            plgpu.set_max_registers(REGISTERS[c.warpgroups][1], action="increase")
            group = 0 if c.share else warpgroup
            first = tile * rows + group * c.block_kv
            keys, values = k_smem.at[group], v_smem.at[group]
            here = (batch, pl.ds(first, c.block_kv), kv_head)

            def segments(name, start, count):
                if not sight.segmented:
                    return None
                return _compat.load_plainly(of[name].at[batch, pl.ds(start, count)], interpret)

            kv_segments = segments("kv_segments", first, c.block_kv)

            def statistic(smem, slot):
                of_each = _compat.load_plainly(smem.at[slot], interpret)
                return lax.broadcast_in_dim(of_each, shape, (1,))

            def release(done):
                slot = lax.rem(done, c.slots)
                reads_end(q_smem.at[slot], dout_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(free.at[slot])

            def release_last(done):
                @pl.when(done > 0)
                def _():
                    release(done - 1)

            def fetch(gmem, smem):
                plgpu.copy_gmem_to_smem(gmem.at[here], smem, mine_here.at[warpgroup])

            def weigh(products, slot, j, masked):
                """Weights as the products take them, and what multiplies dp - delta."""
                lse = _compat.load_plainly(lse_smem.at[slot], interpret)
                weights, slope = rule.weights(products, lse, 1)
                if masked:
                    q_segments = segments("q_segments", j * c.block_q, c.block_q)
                    seen = sight.mask(shape, j, first, (kv_segments, q_segments), interpret)
                    weights, slope = (jnp.where(seen, x, 0.0) for x in (weights, slope))
                return weights.astype(q.dtype), slope

            def both(g, j, masked, dk, dv):
                done = g * count + j - low
                slot = lax.rem(done, c.slots)

                def derivatives(logits, dp):
                    plgpu.barrier_wait(q_here.at[slot])
                    begin(logits, keys, q_smem.at[slot], transpose_b=True)
                    plgpu.barrier_wait(dout_here.at[slot])
                    begin(dp, values, dout_smem.at[slot], transpose_b=True)
                    products = read(logits, 1)
                    if not c.fused:
                        release_last(done)
                    weights, slope = weigh(products, slot, j, masked)
                    begin(dv, weights, dout_smem.at[slot])
                    shift = statistic(delta_smem, slot)
                    return (slope * (read(dp, 1) - shift)).astype(q.dtype)

                ds = with_sums(derivatives, shape, shape, interpret=interpret)
                begin(dk, ds, q_smem.at[slot])
                if c.fused:
                    plgpu.barrier_wait(ds_here.at[lax.rem(done + 1, 2)])
                    of_before = jnp.where(j > low, g, g - 1), jnp.where(j > low, j, high) - 1
                    if parts == c.warpgroups:
                        dq_smem.at[warpgroup][...] = part_of_dq(done - 1, warpgroup)
                        release(done)
                        hand_over(ds, done)
                        pl.when(done > 0)(lambda: add_to_dq(*of_before, warpgroup))
                    else:
                        makes = lax.rem(done, c.warpgroups) == warpgroup

                        @pl.when(makes)
                        def _():
                            dq_smem.at[warpgroup][...] = part_of_dq(done - 1, 0)

                        read(dk)
                        release(done)
                        hand_over(ds, done)
                        pl.when(makes & (done > 0))(lambda: add_to_dq(*of_before, 0))

            def hand_over(ds, done):
                """Shows all warpgroups what this one has of a step's derivatives by logits."""
                ds_smem.at[lax.rem(done, 2), warpgroup][...] = ds
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_here.at[lax.rem(done, 2)])

            def part_of_dq(done, part):
                """64 columns of what step `done` adds to dq, all products waited for."""
                slot = lax.rem(done + 2, 2)

                def product(total):
                    for of in range(c.groups):
                        keys = k_smem.at[of, :, pl.ds(part * 64, 64)]
                        begin(total, ds_smem.at[slot, of], keys, transpose_a=True)
                    return read(total)

                made = with_sums(product, (c.block_q, 64), interpret=interpret)
                for of in range(c.groups):
                    reads_end(ds_smem.at[slot, of], interpret=interpret)
                plgpu.wait_smem_to_gmem(0, wait_read_only=not interpret)
                return made

            def add_to_dq(g, j, part):
                there = dq_gmem.at[tile] if interpret else dq_gmem
                rows = pl.ds(j * c.block_q, c.block_q)
                plgpu.copy_smem_to_gmem(
                    dq_smem.at[warpgroup],
                    there.at[batch, rows, kv_head * G + g, pl.ds(part * 64, 64)],
                    reduction_op=None if interpret else "add",
                )

            def add_last_to_dq():
                """What the last step handed over."""
                plgpu.barrier_wait(ds_here.at[lax.rem(G * count + 1, 2)])

                def add(part):
                    dq_smem.at[warpgroup][...] = part_of_dq(G * count - 1, part)
                    plgpu.commit_smem()
                    add_to_dq(G - 1, high - 1, part)

                makes = (parts == c.warpgroups) | (warpgroup == 0)
                pl.when(makes & (count > 0))(lambda: add(warpgroup if parts > 1 else 0))

            def weights_and_dv(g, j, masked, dv):
                done = g * count + j - low
                slot = lax.rem(done, c.slots)

                def logits_of(logits):
                    plgpu.barrier_wait(q_here.at[slot])
                    begin(logits, keys, q_smem.at[slot], transpose_b=True)
                    return read(logits)

                products = with_sums(logits_of, shape, interpret=interpret)
                release_last(done)
                weights, slope = weigh(products, slot, j, masked)
                handed, there, taken = handed_over

                @pl.when(done > 0)
                def _():
                    plgpu.barrier_wait(taken.at[0])

                handed[...] = slope.astype(q.dtype)
                plgpu.barrier_arrive(there.at[0])
                plgpu.barrier_wait(dout_here.at[slot])
                begin(dv, weights, dout_smem.at[slot])

            def dk_alone(g, j, masked, dk):
                done = g * count + j - low
                slot = lax.rem(done, c.slots)
                handed, there, taken = handed_over

                def derivatives(dp):
                    plgpu.barrier_wait(dout_here.at[slot])
                    begin(dp, values, dout_smem.at[slot], transpose_b=True)
                    plgpu.barrier_wait(there.at[0])
                    slope = handed[...]
                    if not interpret:
                        slope = plgpu.layout_cast(slope, plgpu.Layout.WGMMA)
                    slope = slope.astype(jnp.float32)
                    plgpu.barrier_arrive(taken.at[0])
                    shifted = read(dp) - statistic(delta_smem, slot)
                    release_last(done)
                    return (slope * shifted).astype(q.dtype)

                ds = with_sums(derivatives, shape, interpret=interpret)
                plgpu.barrier_wait(q_here.at[slot])
                begin(dk, ds, q_smem.at[slot])

            def through(step, *sums):
                """All steps, which add to `sums`; returns these, waited for."""

                def turn(g, masked, start, end):
                    at = lambda j: step(g, j, masked, *sums)  # noqa: E731
                    loop(start, end, at, sums)

                def of_head(g):
                    start, end = sight.whole(first, c.block_kv, low, high)
                    if rule.causal or sight.segmented:
                        turn(g, True, low, start)
                    turn(g, False, start, end)
                    if "window" in of or sight.segmented:
                        turn(g, True, end, high)

                loop(0, G, of_head, sums)
                return [read(total) for total in sums]

            def store(total, smem, gmem, factor):
                smem[...] = (total * factor).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem, gmem.at[here])

            def make(step, needs, made):
                """Fetches what the steps need, and stores what they make where that was."""
                for gmem, smem in needs:
                    fetch(gmem, smem)
                plgpu.barrier_wait(mine_here.at[warpgroup])
                if c.fused:
                    hand_over(jnp.zeros(shape, q.dtype), 1)  # before the first step
                totals = with_sums(
                    lambda *sums: through(step, *sums), *[(c.block_kv, H)] * len(made),
                    interpret=interpret,
                )  # fmt: skip
                if c.fused:
                    add_last_to_dq()
                    plgpu.barrier_arrive(keys_read.at[0])  # dk is stored where the keys are
                    plgpu.barrier_wait(keys_read.at[0])
                if not c.fused:
                    release_last(G * count)
                for total, (_, smem), (gmem, factor) in zip(totals, needs, made, strict=True):
                    store(total, smem, gmem, factor)

            of_k, of_v = (dk_gmem, rule.scale), (dv_gmem, 1.0)
            if not c.share:
                make(both, [(k_gmem, keys), (v_gmem, values)], [of_k, of_v])
            else:

                @pl.when(warpgroup == 0)
                def _():
                    make(weights_and_dv, [(k_gmem, keys)], [of_v])

                    @pl.when(count > 0)
                    def _():
                        plgpu.barrier_wait(handed_over[2].at[0])

                @pl.when(warpgroup == 1)
                def _():
                    make(dk_alone, [(v_gmem, values)], [of_k])

            plgpu.wait_smem_to_gmem(0)

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=SWIZZLED)

    def barriers(count, arrivals=1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    handed_over = [smem(*shape), barriers(1), barriers(1)] if c.share else []
    arguments: list[Any] = [q, k, v, dout, lse, delta, *extra.values()]
    if c.fused:
        handed_over = [
            smem(2, c.groups, *shape),
            plgpu.SMEM((c.warpgroups, c.block_q, 64), jnp.float32, transforms=SWIZZLED_32),
            barriers(2, c.warpgroups),
            barriers(1, c.warpgroups),
        ]
        # No interpreter adds in global memory: interpreted, every tile has a dq of its own.
        shape_of_dq = (tiles, *q.shape) if interpret else q.shape
        dq = jax.new_ref(jnp.zeros(shape_of_dq, jnp.float32), memory_space=plgpu.GMEM)
        arguments.append(dq)
    dk, dv = _compat.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch_types=[
            smem(c.groups, c.block_kv, H),
            smem(c.groups, c.block_kv, H),
            smem(c.slots, c.block_q, H),
            smem(c.slots, c.block_q, H),
            plgpu.SMEM((c.slots, c.block_q), jnp.float32),
            plgpu.SMEM((c.slots, c.block_q), jnp.float32),
            barriers(c.warpgroups, 1 if c.share else 2),
            barriers(c.slots, 2),
            barriers(c.slots, 2),
            barriers(c.slots, c.warpgroups),
            *handed_over,
        ],
        grid=(tiles * heads,),
        grid_names=("block",),
        num_threads=c.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )(*arguments)
    if not c.fused:
        return [dk, dv]
    return [dk, dv, jnp.sum(dq[...], axis=0) if interpret else dq[...]]
