"""Attention on a TPU, backward: one kernel for dq and one for dk and dv, without atomic sums.

Both make the weights again from the log-sum-exp that the forward pass kept. The first is the
forward's grid: a block of queries stays, blocks of keys pass. In the second a block of keys stays,
and the blocks of queries of its G query heads pass one head after the other, so that dk and dv are
summed over the group in scratch and every run gives the same bits. It holds logits as [keys,
queries]: what belongs to a query is then a row, as it lies in memory.

Cost: 14 H FLOPs of each pair in the blocks that meet (7 products; 5 if one kernel made all three).
With p the weights: dv = p^T dout, dp = dout v^T, ds = p (dp - delta) with delta = rowsum(out dout)
less the log-sum-exp's own cotangent, dq = scale ds k, dk = scale ds^T q. Source: arXiv 2307.08691.
"""

from __future__ import annotations

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.mosaic_tpu_blocks import (
    LANES,
    LOG2E,
    Call,
    at,
    column_of,
    existing,
    like,
    product,
    specs_where_queries_stay,
    spread,
)


def gradients(
    call: Call,
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    places: tuple,
    lse: Float[Array, "B N 1 T"],
    dout: Float[Array, "B N T H"],
    delta: Float[Array, "B N 1 T"],
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """dq, dk and dv, in the dtypes of q, k and v; `places` is (offsets, windows, segments)."""
    offsets, windows, segments = places
    operands = (offsets, windows, q, k, v, dout, lse, delta, *segments)
    return _of_queries(call, *operands), *_of_keys(call, *operands)


def _of_queries(call: Call, offsets, windows, q, k, v, dout, lse, delta, *segments):
    mask, (B, N, _, H) = call.mask, q.shape
    by_query, by_key, row, ids = specs_where_queries_stay(mask, N // k.shape[1], H)
    scratch = [
        pltpu.VMEM((mask.queries, H), jnp.float32),
        pltpu.VMEM((mask.queries, LANES), jnp.float32),
        pltpu.VMEM((mask.queries, LANES), jnp.float32),
    ]
    if mask.segmented:
        scratch += [pltpu.VMEM((mask.queries, LANES), jnp.int32)]
    return pl.pallas_call(
        functools.partial(_dq_kernel, call),
        out_shape=like(q),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N, mask.query_blocks, mask.key_steps),
            in_specs=[by_query, by_key, by_key, by_query, row, row, *ids],
            out_specs=by_query,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=call.cost(3, q, q, q, k, v),
        name="attention_dq",
        interpret=call.interpret,
    )(offsets, windows, q, k, v, dout, lse, delta, *segments)


def _dq_kernel(call: Call, offsets, windows, q, k, v, dout, lse, delta, *rest):
    mask = call.mask
    if mask.segmented:
        q_segments, kv_segments, dq, sums, lses, deltas, segments = rest
    else:
        dq, sums, lses, deltas = rest
    b, _, i, step = (pl.program_id(axis) for axis in range(4))
    offset, window = offsets[b], windows[0]
    first, last = mask.keys_of(i, offset, window)
    j = first + step

    @pl.when(step == 0)
    def _start():
        sums[...] = jnp.zeros_like(sums)
        lses[...] = column_of(lse[...] * LOG2E)
        deltas[...] = column_of(delta[...])
        if mask.segmented:
            segments[...] = column_of(q_segments[...])

    def meet(masked: bool):
        keys = k[...]
        logits = call.logits(product(q[...], keys, 1, 1))
        weights = jnp.exp2(logits - spread(lses[...], logits.shape[1]))
        dlogits = product(dout[...], v[...], 1, 1) - spread(deltas[...], logits.shape[1])
        dlogits = call.through_cap(weights * dlogits, logits)
        if masked:
            seen = mask.visible(logits.shape, 0, i, j, offset, window)
            if mask.segmented:
                seen &= spread(segments[...], seen.shape[1]) == kv_segments[...]
            dlogits = jnp.where(seen, dlogits, 0.0)
            keys = existing(keys, j, mask.S)
        sums[...] += product(dlogits.astype(keys.dtype), keys, 1, 0)

    mask.where_they_meet(i, j, j <= last, offset, window, meet)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        dq[...] = (sums[...] * call.scale).astype(dq.dtype)


def _of_keys(call: Call, offsets, windows, q, k, v, dout, lse, delta, *segments):
    mask, (B, K, _, H), group = call.mask, k.shape, q.shape[1] // k.shape[1]

    def block_of_queries(b, j, step, offsets, windows):
        return at(*mask.queries_of(j, offsets[b], windows[0]), step, mask.query_blocks)

    def of_query(b, n, j, g, step, *places):
        return b, n * group + g, block_of_queries(b, j, step, *places), 0

    def row_of_query(b, n, j, g, step, *places):
        return b, n * group + g, 0, block_of_queries(b, j, step, *places)

    by_key = pl.BlockSpec((None, None, mask.keys, H), lambda b, n, j, g, step, *_: (b, n, j, 0))
    by_query = pl.BlockSpec((None, None, mask.queries, H), of_query)
    row = pl.BlockSpec((None, None, 1, mask.queries), row_of_query)
    in_specs = [by_query, by_key, by_key, by_query, row, row]
    scratch = [pltpu.VMEM((mask.keys, H), jnp.float32), pltpu.VMEM((mask.keys, H), jnp.float32)]
    if mask.segmented:
        in_specs += [
            pl.BlockSpec(
                (None, 1, mask.queries),
                lambda b, n, j, g, step, *places: (b, 0, block_of_queries(b, j, step, *places)),
            ),
            pl.BlockSpec((None, 1, mask.keys), lambda b, n, j, g, step, *_: (b, 0, j)),
        ]
        scratch += [pltpu.VMEM((mask.keys, LANES), jnp.int32)]
    return pl.pallas_call(
        functools.partial(_dkv_kernel, call),
        out_shape=(like(k), like(v)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, mask.key_blocks, group, mask.query_steps),
            in_specs=in_specs,
            out_specs=(by_key, by_key),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        cost_estimate=call.cost(4, q, q, k, k, v, v),
        name="attention_dkv",
        interpret=call.interpret,
    )(offsets, windows, q, k, v, dout, lse, delta, *segments)


def _dkv_kernel(call: Call, offsets, windows, q, k, v, dout, lse, delta, *rest):
    mask = call.mask
    if mask.segmented:
        q_segments, kv_segments, dk, dv, dk_sums, dv_sums, segments = rest
    else:
        dk, dv, dk_sums, dv_sums = rest
    b, _, j, g, step = (pl.program_id(axis) for axis in range(5))
    offset, window = offsets[b], windows[0]
    first, last = mask.queries_of(j, offset, window)
    i = first + step

    @pl.when((g == 0) & (step == 0))
    def _start():
        dk_sums[...] = jnp.zeros_like(dk_sums)
        dv_sums[...] = jnp.zeros_like(dv_sums)
        if mask.segmented:
            segments[...] = column_of(kv_segments[...])

    def meet(masked: bool):
        queries, douts = q[...], dout[...]
        logits = call.logits(product(k[...], queries, 1, 1))
        weights = jnp.exp2(logits - lse[...] * LOG2E)
        dweights = product(v[...], douts, 1, 1)
        dlogits = call.through_cap(weights * (dweights - delta[...]), logits)
        if masked:
            seen = mask.visible(logits.shape, 1, i, j, offset, window)
            if mask.segmented:
                seen &= spread(segments[...], seen.shape[1]) == q_segments[...]
            weights, dlogits = (jnp.where(seen, x, 0.0) for x in (weights, dlogits))
            queries, douts = (existing(x, i, mask.T) for x in (queries, douts))
        dv_sums[...] += product(weights.astype(douts.dtype), douts, 1, 0)
        dk_sums[...] += product(dlogits.astype(queries.dtype), queries, 1, 0)

    mask.where_they_meet(i, j, i <= last, offset, window, meet)

    @pl.when((g == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _finish():
        dk[...] = (dk_sums[...] * call.scale).astype(dk.dtype)
        dv[...] = dv_sums[...].astype(dv.dtype)
