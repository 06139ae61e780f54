"""Attention on a TPU, forward: online softmax over blocks of keys, in vector memory.

The grid is (B, N, blocks of queries, blocks of keys); the last axis is a loop in which the sums,
the largest logit and the total of a block of queries stay in scratch. Its first step is the first
block of keys that the queries see; after the last one nothing is computed and nothing fetched. A
block whose pairs all see each other takes no mask. Query head n reads key head n // G. With a
causal mask and a window known when compiled the loop is only as long as the window asks for.

Cost: 4 H FLOPs of each pair in the blocks that meet; k and v are read once a block of queries. q,
k, v and out are laid out by heads ([B, N, T, H]), which XLA folds into what makes and takes them
where it can. Softmax is in base 2: scale and log2(e) are one multiplication.

The compiler does not split the call over devices: under `shard_map` each runs it on its own heads
or rows. Algorithm: arXiv 2205.14135, 2307.08691.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import mosaic_tpu_backward
from pallas_kernels.flash_attention.mosaic_tpu_blocks import (
    LANES,
    LOG2E,
    Call,
    Mask,
    column_of,
    existing,
    like,
    product,
    row_of,
    specs_where_queries_stay,
    spread,
)

WIDTHS = (64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float32)
_FAR = 1 << 30  # a window that no position reaches past


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys that a step holds; multiples of 128.

    In libtpu's own schedule (0.0.42.1, v5e, H=128, bfloat16) a block of 512 x 512 without a mask
    fills 82 % of the matrix units' slots forward, 90 % in dq and 93 % in dk and dv.
    """

    queries: int = 512
    keys: int = 512


def refusal(*, platform: str, dtype, H: int, **_others) -> str | None:
    """Why these kernels cannot take a call, or None if they can."""
    if platform != "tpu":
        return f"the TPU's kernels need a TPU, and arrays are on {platform}"
    if dtype not in DTYPES:
        return f"the TPU's kernels take bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if H not in WIDTHS:
        return f"the TPU's kernels take a head width of 64, 128 or 256, not {H}"
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | Int[Array, ""] | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: int | Int[Array, " B"] | Int[Array, ""] = 0,
    sinks: Float[Array, " N"] | None = None,
    deterministic: bool = False,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The reference's (output, log-sum-exp); differentiable in q, k, v and sinks from both.

    Args:
      q, k, v: bfloat16 or float32, H of 64, 128 or 256; any T and S.
      window, q_offset: may be traced.
      deterministic: the backward pass always is.
      blocks: what a step holds; None takes the default.
      interpret: `pltpu.InterpretParams(...)` runs it on a CPU.

    Raises:
      ValueError: a dtype or head width that the kernels do not take, or blocks that do not fit.
    """
    del deterministic
    (B, T, N, H), S = q.shape, k.shape[1]
    if reason := refusal(platform="tpu", dtype=q.dtype, H=H):
        raise ValueError(f"attention: q{q.shape}: {reason}")
    if 0 in (T, S):
        raise ValueError(f"attention: q{q.shape} and k{k.shape} hold no queries or no keys")
    blocks = blocks or Blocks()
    if blocks.queries % LANES or blocks.keys % LANES:
        raise ValueError(f"attention: {blocks} are not multiples of {LANES}")
    mask = Mask(
        T=T,
        S=S,
        queries=min(blocks.queries, T),
        keys=min(blocks.keys, S),
        causal=causal,
        windowed=window is not None,
        segmented=segment_ids is not None,
        span=max(window, 1) if isinstance(window, int) else None,
    )
    call = Call(mask, H**-0.5 if scale is None else scale, soft_cap, interpret)
    offsets = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
    far = jnp.asarray(_FAR, jnp.int32)
    windows = jnp.minimum(far if window is None else jnp.asarray(window, jnp.int32), far)
    if sinks is None:
        sinks = jnp.full((N,), -jnp.inf, jnp.float32)
    segments = tuple(ids.astype(jnp.int32)[:, None] for ids in segment_ids or ())
    places = (offsets, windows.reshape(1), segments)
    by_heads = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k, v, sinks = _alike(*by_heads, sinks.astype(jnp.float32))
    result: Any = _attention(call, q, k, v, sinks, places)
    out, lse = result
    return out.swapaxes(1, 2), lse[:, :, 0]


def _alike(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, each varying over all the devices of a `shard_map` that any varies over."""
    over = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [frozenset().union(*over) - mine for mine in over]
    return tuple(
        lax.pcast(x, tuple(axes), to="varying") if axes else x
        for x, axes in zip(arrays, missing, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q, k, v, sinks, places) -> tuple[Array, Array]:
    return _forward(call, q, k, v, sinks, places)


def _attention_forward(call: Call, q, k, v, sinks, places):
    out, lse = _forward(call, q, k, v, sinks, places)
    return (out, lse), (q, k, v, sinks, places, out, lse)


def _attention_backward(call: Call, kept, cotangents):
    q, k, v, sinks, places, out, lse = kept
    dout, dlse = cotangents
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    delta = delta[:, :, None] - dlse
    dq, dk, dv = mosaic_tpu_backward.gradients(call, q, k, v, places, lse, dout, delta)
    weights = jnp.exp(sinks[:, None, None] - jnp.where(jnp.isfinite(lse), lse, jnp.inf))
    dsinks = -jnp.sum(weights * jnp.where(weights > 0, delta, 0), axis=(0, 2, 3))
    return dq, dk, dv, dsinks, None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(call: Call, q, k, v, sinks, places) -> Any:
    """out [B, N, T, H] and lse [B, N, 1, T] of q [B, N, T, H], k and v [B, K, S, H]."""
    mask, (B, N, T, H) = call.mask, q.shape
    offsets, windows, segments = places
    by_query, by_key, row, ids = specs_where_queries_stay(mask, N // k.shape[1], H)
    scratch = [
        pltpu.VMEM((mask.queries, H), jnp.float32),
        pltpu.VMEM((mask.queries, LANES), jnp.float32),
        pltpu.VMEM((mask.queries, LANES), jnp.float32),
    ]
    if mask.segmented:
        scratch += [pltpu.VMEM((mask.queries, LANES), jnp.int32)]
    return pl.pallas_call(
        functools.partial(_kernel, call),
        out_shape=(like(q), like(q, B, N, 1, T, dtype=jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, N, mask.query_blocks, mask.key_steps),
            in_specs=[by_query, by_key, by_key, *ids],
            out_specs=(by_query, row),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=call.cost(2, q, q, k, v),
        name="attention_forward",
        interpret=call.interpret,
    )(offsets, windows, sinks, q, k, v, *segments)


def _kernel(call: Call, offsets, windows, sinks, q_ref, k_ref, v_ref, *rest):
    mask = call.mask
    if mask.segmented:
        q_segments, kv_segments, out_ref, lse_ref, sums, top, total, segments = rest
    else:
        out_ref, lse_ref, sums, top, total = rest
    b, n, i, step = (pl.program_id(axis) for axis in range(4))
    offset, window = offsets[b], windows[0]
    first, last = mask.keys_of(i, offset, window)
    j = first + step

    @pl.when(step == 0)
    def _start():
        sink = jnp.full(top.shape, sinks[n] * LOG2E)
        top[...] = sink
        total[...] = jnp.where(sink == -jnp.inf, 0.0, 1.0)
        sums[...] = jnp.zeros_like(sums)
        if mask.segmented:
            segments[...] = column_of(q_segments[...])

    def meet(masked: bool):
        logits = call.logits(product(q_ref[...], k_ref[...], 1, 1))
        v = v_ref[...]
        if masked:
            seen = mask.visible(logits.shape, 0, i, j, offset, window)
            if mask.segmented:
                seen &= spread(segments[...], seen.shape[1]) == kv_segments[...]
            logits = jnp.where(seen, logits, -jnp.inf)
            v = existing(v, j, mask.S)
        before = top[...]
        highest = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        shift = jnp.where(highest == -jnp.inf, 0.0, highest)
        weights = jnp.exp2(logits - spread(shift, logits.shape[1]))
        shrink = jnp.exp2(before - shift)
        added = product(weights.astype(v.dtype), v, 1, 0)
        sums[...] = sums[...] * spread(shrink, sums.shape[1]) + added
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        top[...] = highest

    mask.where_they_meet(i, j, j <= last, offset, window, meet)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        seen = total[...] > 0
        whole = jnp.where(seen, total[...], 1.0)
        out_ref[...] = (sums[...] / spread(whole, sums.shape[1])).astype(out_ref.dtype)
        lse_ref[...] = row_of(jnp.where(seen, top[...] / LOG2E + jnp.log(whole), -jnp.inf))
