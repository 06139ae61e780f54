"""Attention on Hopper by Pallas Mosaic GPU kernels: the forward pass, warp-specialised.

A block makes `warpgroups` x `block_q` rows of one head. One warpgroup copies blocks of keys and of
values into a ring of slots each; the others multiply, queries from shared memory and weights from
registers. While one makes its softmax, in base 2 with the scale folded into one multiply-add, the
others have the tensor cores. Key blocks that every row sees in full take no mask;
those that no row sees are never copied. Blocks run in sections of heads whose keys and values fit
the L2 cache; under a causal mask the longest of a section start first. Gradients are those of
`mosaic_gpu_backward`.

Cost: 4 H FLOPs for each visible pair of a query head and a key; keys and values are read once a
block of rows, and nothing of size [T, S] is written. Algorithm: arXiv 2307.08691 and 2407.08608.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import _compat
from pallas_kernels.flash_attention.mosaic_gpu_backward import gradients
from pallas_kernels.flash_attention.mosaic_gpu_config import CONFIGS, LOG2E, Config, Rule, sections
from pallas_kernels.flash_attention.sight import Sight
from pallas_kernels.matmul.tiles import SWIZZLED
from pallas_kernels.mma import REGISTERS, add_product, laid_out, product_with_transposed


def refusal(*, platform: str, dtype, H: int, scale: float | None = None, **_others) -> str | None:
    """Why the kernel cannot take this call, or None if it can."""
    if reason := _compat.not_hopper(platform):
        return reason
    return _misfit(dtype, H, scale)


def _misfit(dtype, H: int, scale: float | None) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if H not in CONFIGS:
        return f"the kernel takes a head width of {', '.join(map(str, CONFIGS))}, not {H}"
    if scale is not None and scale <= 0:
        return f"the kernel takes a scale above zero, not {scale}"
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
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The reference's output and log-sum-exp; differentiable in q, k, v and sinks.

    T and S that are not multiples of 8 are padded, at the cost of a copy.

    Raises:
      ValueError: a dtype, a head width or a scale that the kernel does not take.
    """
    B, T, _, H = q.shape
    S = k.shape[1]
    if reason := _misfit(q.dtype, H, scale):
        raise ValueError(f"attention: q{q.shape}, k{k.shape}: {reason}")
    config = CONFIGS[H] if config is None else config
    rows = config.warpgroups * config.block_q
    extra: dict[str, Array] = {}
    if not (isinstance(q_offset, int) and q_offset == 0):
        extra["offset"] = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
    if window is not None:
        extra["window"] = jnp.asarray(window, jnp.int32).reshape(1)
    if segment_ids is not None:
        extra["q_segments"] = _up_to(segment_ids[0].astype(jnp.int32), rows)
        extra["kv_segments"] = _up_to(segment_ids[1].astype(jnp.int32), config.block_kv)
    if sinks is not None:
        extra["sinks"] = sinks.astype(jnp.float32)
    factor = H**-0.5 if scale is None else scale
    call = _Call(config, causal, soft_cap, factor, S, deterministic, interpret)
    out, lse = _attention(call, _up_to(q, 8), _up_to(k, 8), _up_to(v, 8), extra)
    return out[:, :T], lse[:, :, :T]


def _up_to(x: Array, multiple: int) -> Array:
    """`x` with zeros after its axis 1, which comes to a multiple."""
    beyond = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, beyond)] + [(0, 0)] * (x.ndim - 2)) if beyond else x


@dataclasses.dataclass(frozen=True)
class _Call:
    config: Config
    causal: bool
    soft_cap: float | None
    scale: float
    S: int  # keys, without padding
    deterministic: bool  # the gradients
    interpret: Any


def _kernel(call: _Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    c, interpret = call.config, call.interpret
    B, T, N, H = q.shape
    G = N // k.shape[2]
    rows, shape = c.warpgroups * c.block_q, (c.block_q, c.block_kv)
    tiles, heads = -(-T // rows), B * N
    section = sections(heads, 2 * k.shape[1] * H * k.dtype.itemsize, G)
    names = list(extra)

    def kernel(*refs):
        q_gmem, k_gmem, v_gmem, *given = refs[: 3 + len(names)]
        out_gmem, lse_gmem, q_smem, k_smem, v_smem, lse_smem, *barriers = refs[3 + len(names) :]
        q_here, k_here, v_here, k_free, v_free = barriers
        of = dict(zip(names, given, strict=True))
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        part, place = lax.div(block, tiles * section), lax.rem(block, tiles * section)
        tile = lax.div(place, section)
        tile = tiles - 1 - tile if call.causal else tile
        head = part * section + lax.rem(place, section)
        batch, n = lax.div(head, N), lax.rem(head, N)
        sight = Sight(
            causal=call.causal,
            segmented="q_segments" in of,
            S=call.S,
            block=c.block_kv,
            offset=of["offset"][batch] if "offset" in of else jnp.int32(0),
            window=of["window"][0] if "window" in of else None,
        )
        low, high = sight.blocks(tile * rows, rows)

        @pl.when(warpgroup == c.warpgroups)
        def _copy():
            plgpu.set_max_registers(REGISTERS[c.warpgroups][0], action="decrease")

            @pl.loop(low, high)
            def _(j):
                slot = lax.rem(j - low, c.slots)
                keys = (batch, pl.ds(j * c.block_kv, c.block_kv), lax.div(n, G))
                for gmem, smem, here, free in (
                    (k_gmem, k_smem, k_here, k_free),
                    (v_gmem, v_smem, v_here, v_free),
                ):

                    @pl.when(j - low >= c.slots)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(gmem.at[keys], smem.at[slot], here.at[slot])

            # The last releases are waited for too: this warpgroup may not leave before the others.
            @pl.loop(0, lax.min(high - low, c.slots))
            def _(slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

        @pl.when(warpgroup < c.warpgroups)
        def _multiply():
            plgpu.set_max_registers(REGISTERS[c.warpgroups][1], action="increase")
            first = tile * rows + warpgroup * c.block_q
            mine = q_smem.at[warpgroup]
            queries = (batch, pl.ds(first, c.block_q), n)
            plgpu.copy_gmem_to_smem(q_gmem.at[queries], mine, q_here.at[warpgroup])
            plgpu.barrier_wait(q_here.at[warpgroup])

            def segments(name, start, count):
                if not sight.segmented:
                    return None
                return _compat.load_plainly(of[name].at[batch, pl.ds(start, count)], interpret)

            q_segments = segments("q_segments", first, c.block_q)

            def step(j, carry, masked):
                acc, top, total = carry
                slot = lax.rem(j - low, c.slots)
                plgpu.barrier_wait(k_here.at[slot])
                logits = product_with_transposed(mine, k_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(k_free.at[slot])
                unit = call.scale * LOG2E
                if call.soft_cap is not None:
                    # tanh(x) = 1 - 2 / (1 + e^2x); the chip's own tanh has eleven bits.
                    power = jnp.exp2(logits * (2 * unit / call.soft_cap))
                    logits, unit = 1 - 2 / (1 + power), call.soft_cap * LOG2E
                if masked:
                    kv_segments = segments("kv_segments", j * c.block_kv, c.block_kv)
                    both = (q_segments, kv_segments)
                    seen = sight.mask(shape, j, first, both, interpret)
                    logits = jnp.where(seen, logits, -jnp.inf)
                new = jnp.maximum(top, jnp.max(logits, axis=1) * unit)
                shift = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
                weights = jnp.exp2(logits * unit - lax.broadcast_in_dim(shift, shape, (0,)))
                shrink = jnp.exp2(top - shift)
                total = total * shrink + jnp.sum(weights, axis=1)
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, (0,))
                acc, new, total, weights = lax.optimization_barrier(
                    (acc, new, total, weights.astype(q.dtype))
                )
                plgpu.barrier_wait(v_here.at[slot])
                acc = add_product(acc, weights, v_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new, total

            top, total = (jnp.full((c.block_q,), x, jnp.float32) for x in (-jnp.inf, 0.0))
            if "sinks" in of:
                top = jnp.full_like(top, of["sinks"][n] * LOG2E)
                total = jnp.where(top == -jnp.inf, 0.0, 1.0)
            acc = jnp.zeros((c.block_q, H), jnp.float32)
            carry = laid_out(acc, top, total, interpret=interpret)
            begin, end = sight.whole(first, c.block_q, low, high)
            masked, plain = (functools.partial(step, masked=m) for m in (True, False))
            if "window" in of or sight.segmented:
                carry = lax.fori_loop(low, begin, masked, carry)
            carry = lax.fori_loop(begin, end, plain, carry)
            acc, top, total = lax.fori_loop(end, high, masked, carry)

            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            mine[...] = (acc * lax.broadcast_in_dim(1 / total, acc.shape, (0,))).astype(q.dtype)
            lse = (top + jnp.log2(total)) * (1 / LOG2E)
            lse_smem[warpgroup] = jnp.where(seen, lse, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_gmem.at[queries])
            plgpu.copy_smem_to_gmem(
                lse_smem.at[warpgroup], lse_gmem.at[batch, n, pl.ds(first, c.block_q)]
            )
            plgpu.wait_smem_to_gmem(0)

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=SWIZZLED)

    def barriers(count, arrivals=1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            # A copy of one row that goes past its end would go on into the next row.
            jax.ShapeDtypeStruct((B, N, tiles * rows), jnp.float32),
        ],
        scratch_types=[
            smem(c.warpgroups, c.block_q, H),
            smem(c.slots, c.block_kv, H),
            smem(c.slots, c.block_kv, H),
            plgpu.SMEM((c.warpgroups, c.block_q), jnp.float32),
            barriers(c.warpgroups),
            barriers(c.slots),
            barriers(c.slots),
            barriers(c.slots, c.warpgroups),
            barriers(c.slots, c.warpgroups),
        ],
        grid=(tiles * heads,),
        grid_names=("block",),
        num_threads=c.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )(q, k, v, *extra.values())
    return out, lse[:, :, :T]


def _forward(call: _Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    return _over_batches(functools.partial(_kernel, call))(q, k, v, extra)


def _forward_for_gradient(call: _Call, q: Array, k: Array, v: Array, extra: Any) -> Any:
    out, lse = _forward(call, q, k, v, extra)
    return (out, lse), (q, k, v, out, lse, extra)


def _gradients(call: _Call, kept: Any, cotangents: Any) -> Any:
    *arrays, extra = kept
    rule = Rule(call.causal, call.soft_cap, call.scale, call.S, call.interpret)
    run = functools.partial(gradients, rule, call.deterministic)
    of_arrays, of_sinks = _over_batches(run)(*arrays, *cotangents, extra)
    return *of_arrays, dict.fromkeys(extra) | of_sinks


def _over_batches(run: Any) -> Any:
    """`run`, whose arrays lead with B, under `jax.vmap`: the mapped axis becomes part of B."""
    batched = jax.custom_batching.custom_vmap(run)

    @batched.def_vmap
    def _(size, mapped, *operands):
        arrays, tree = jax.tree.flatten(operands)
        flags = jax.tree.leaves(mapped)
        extra, of_extra = operands[-1], mapped[-1]
        if "sinks" in extra or of_extra.get("window"):  # these do not lead with B

            def one(i):
                here = [x[i] if flag else x for x, flag in zip(arrays, flags, strict=True)]
                return run(*jax.tree.unflatten(tree, here))

            out = lax.map(one, jnp.arange(size))
        else:

            def fold(x, flag):
                x = x if flag else jnp.broadcast_to(x, (size, *x.shape))
                return x.reshape(-1, *x.shape[2:])

            *folded, masks = jax.tree.unflatten(tree, list(map(fold, arrays, flags)))
            masks |= {"window": extra["window"]} if "window" in extra else {}
            out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), batched(*folded, masks))
        return out, jax.tree.map(lambda _: True, out)

    return batched


_attention = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_attention.defvjp(_forward_for_gradient, _gradients)
