"""Attention on Hopper by a Pallas Mosaic GPU kernel: the forward pass, warp-specialised.

A block makes `warpgroups` x `block_q` rows of one head. One warpgroup copies blocks of keys and of
values into a ring of slots each; the others multiply, queries from shared memory and weights from
registers, and take turns: while one has the tensor cores, the other makes its softmax, in base 2
with the scale folded into one multiply-add. Key blocks that every row sees in full take no mask;
those that no row sees are never copied. Blocks run in sections of heads whose keys and values fit
the L2 cache; under a causal mask the longest of a section start first.

Interpreted without a race and lowered; not yet timed on a chip, so chosen only where it is asked
for.

Cost: 4 H FLOPs for each visible pair of a query head and a key; keys and values are read once a
block of rows, and nothing of size [T, S] is written. Algorithm: arXiv 2307.08691 and 2407.08608.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import _compat
from pallas_kernels.flash_attention.sight import Sight
from pallas_kernels.matmul.tiles import SWIZZLED
from pallas_kernels.mma import add_product, product_with_transposed

LOG2E = math.log2(math.e)
SECTION_BYTES = 32 * 2**20  # keys and values that stay in the L2 cache together
SHARED_MEMORY = 232_448  # bytes that a block may have


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows a warpgroup (64), keys a block, slots of each ring, warpgroups that multiply (2)."""

    block_q: int = 64
    block_kv: int = 128
    slots: int = 2
    warpgroups: int = 2

    def shared_memory(self, H: int) -> int:
        """Bytes of queries, keys, values and log-sum-exps of a block."""
        rows = self.warpgroups * self.block_q
        return 2 * H * (rows + 2 * self.slots * self.block_kv) + 4 * rows


CONFIGS = {64: Config(), 128: Config(), 256: Config(block_kv=64)}


def refusal(*, platform: str, dtype, H: int, scale: float | None = None, **_others) -> str | None:
    """Why the kernel cannot take this call, or None if it can."""
    if platform not in ("gpu", "cuda"):
        return f"Mosaic GPU needs an NVIDIA Hopper GPU, and arrays are on {platform}"
    if (capability := _compat.compute_capability()) not in (None, "9.0"):
        return f"Mosaic GPU's kernel is for compute capability 9.0 (Hopper), not {capability}"
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
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The reference's output and log-sum-exp; forward only, its gradient raises ValueError.

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
    call = _Call(config, causal, soft_cap, H**-0.5 if scale is None else scale, S, interpret)
    out, lse = _forward_only(call, _up_to(q, 8), _up_to(k, 8), _up_to(v, 8), extra)
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
    interpret: Any


def _forward(call: _Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    c, interpret = call.config, call.interpret
    B, T, N, H = q.shape
    G = N // k.shape[2]
    rows, shape = c.warpgroups * c.block_q, (c.block_q, c.block_kv)
    tiles, heads = -(-T // rows), B * N
    fit = max(1, SECTION_BYTES // (2 * k.shape[1] * H * k.dtype.itemsize))
    section = math.gcd(heads, 2 ** int(math.log2(fit * G)))  # heads that run together
    names = list(extra)

    def kernel(*refs):
        q_gmem, k_gmem, v_gmem, *given = refs[: 3 + len(names)]
        out_gmem, lse_gmem, q_smem, k_smem, v_smem, lse_smem, *barriers = refs[3 + len(names) :]
        q_here, k_here, v_here, k_free, v_free, turn = barriers
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
            plgpu.set_max_registers(40, action="decrease")

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
            plgpu.set_max_registers(232, action="increase")
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

            def in_turn(product):
                """The tensor cores go round: who has used them wakes the next."""
                plgpu.barrier_wait(turn.at[warpgroup])
                result = product()
                plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, c.warpgroups)])
                return result

            def step(j, carry, masked):
                acc, top, total = carry
                slot = lax.rem(j - low, c.slots)
                plgpu.barrier_wait(k_here.at[slot])
                logits = in_turn(
                    lambda: product_with_transposed(mine, k_smem.at[slot], interpret=interpret)
                )
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
                acc = in_turn(
                    lambda: add_product(acc, weights, v_smem.at[slot], interpret=interpret)
                )
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new, total

            @pl.when(warpgroup == c.warpgroups - 1)
            def _():
                plgpu.barrier_arrive(turn.at[0])

            top, total = (jnp.full((c.block_q,), x, jnp.float32) for x in (-jnp.inf, 0.0))
            if "sinks" in of:
                top = jnp.full_like(top, of["sinks"][n] * LOG2E)
                total = jnp.where(top == -jnp.inf, 0.0, 1.0)
            carry = (jnp.zeros((c.block_q, H), jnp.float32), top, total)
            carry = carry if interpret else _laid_out(*carry)
            begin, end = sight.whole(first, c.block_q, low, high)
            masked, plain = (functools.partial(step, masked=m) for m in (True, False))
            if "window" in of or sight.segmented:
                carry = lax.fori_loop(low, begin, masked, carry)
            carry = lax.fori_loop(begin, end, plain, carry)
            acc, top, total = lax.fori_loop(end, high, masked, carry)

            @pl.when(warpgroup == 0)
            def _():
                plgpu.barrier_wait(turn.at[0])

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

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
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
            barriers(c.warpgroups),
        ],
        grid=(tiles * heads,),
        grid_names=("block",),
        num_threads=c.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )(q, k, v, *extra.values())


def _laid_out(acc: Array, top: Array, total: Array) -> tuple[Array, Array, Array]:
    """The loop's values as the tensor cores hold sums, and their rows."""
    row = plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(acc, plgpu.Layout.WGMMA),
        plgpu.layout_cast(top, row),
        plgpu.layout_cast(total, row),
    )


def _no_gradient(call: _Call, q: Array, k: Array, v: Array, extra: dict[str, Array]) -> Any:
    raise ValueError(
        "attention(implementation='mosaic_gpu') has no gradient yet; take 'cudnn' or 'triton'"
    )


_forward_only = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_forward_only.defvjp(_no_gradient, lambda *_: ())
