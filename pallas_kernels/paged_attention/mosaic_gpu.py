"""Attention over pages on Hopper by a Pallas Mosaic GPU kernel: split keys, a merge of fixed order.

A program makes what SPLIT keys give to a tile of 64 rows: the G query heads that share a key head,
of one query (T <= B) or of 64 // G. One warpgroup looks pages up and copies 64 keys and values at a
time, page by page, into a ring of slots; the other multiplies, as flash attention's do. XLA packs q
into tiles before, and after adds the splits up in their order, one fusion each.

Tensor cores suit a decode step although it fills G of 64 rows: the tile asks for 64 FLOPs a byte of
keys and values, about a third of what an H100 can do while it reads at full speed; without them
G = 8 asks float32 units for half their peak, and to convert each number before.

Cost: keys and values are read once a tile, of live pages alone; each split writes and XLA reads
4 N H bytes of a query, its rows rounded up to 8 a tile.

A row's bits depend neither on other rows nor on B, M or P: splits begin at fixed positions. Where
T > B there is one split, unless `invariant`, for which how a prompt was chunked does not matter
either; it costs the splits.

Not yet timed on a chip, and so never chosen unasked. Pages are not quantised here.
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
from pallas_kernels.flash_attention.mosaic_gpu_config import LOG2E
from pallas_kernels.matmul.tiles import SWIZZLED, SWIZZLED_32
from pallas_kernels.mma import add_product, laid_out, product_with_transposed
from pallas_kernels.paged_attention.rows import Sight, tiles

TILE = 64  # rows, and keys a step
UNSPLIT = 2**30


@dataclasses.dataclass(frozen=True)
class Config:
    """Keys a split, about; slots of the ring of keys and of that of values."""

    split: int = 512
    slots: int = 2


CONFIGS = {64: Config(), 128: Config(), 256: Config(slots=1)}  # what shared memory holds


def refusal(
    *,
    platform: str,
    dtype,
    pages_dtype,
    page: int,
    N: int,
    K: int,
    H: int,
    scale: float = 1.0,
    soft_cap: float | None = None,
    **_others,
) -> str | None:
    """Why the kernel cannot take this call, or None if it can."""
    if reason := _compat.not_hopper(platform):
        return reason
    return _misfit(dtype, pages_dtype, page, N // K, H, scale, soft_cap)


def _misfit(
    dtype, pages_dtype, page: int, G: int, H: int, scale: float, soft_cap: float | None
) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if pages_dtype != dtype:
        return f"the kernel takes pages of q's dtype, not {jnp.dtype(pages_dtype).name}"
    if H not in CONFIGS:
        return f"the kernel takes a head width of {', '.join(map(str, CONFIGS))}, not {H}"
    if page % 8 or (TILE % page and page % TILE):
        return f"the kernel takes pages of 8, 16, 32 or a multiple of 64 places, not {page}"
    if G > TILE:
        return f"the kernel takes up to {TILE} query heads a key head, not {G}"
    if scale <= 0:
        return f"the kernel takes a scale above zero, not {scale}"
    if soft_cap is not None and soft_cap <= 0:
        return f"the kernel takes a soft cap above zero, not {soft_cap}"
    return None


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P K page H"],
    v_pages: Float[Array, "P K page H"],
    page_table: Int[Array, "B M"],
    starts: Int[Array, " B+1"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: None = None,
    v_scale: None = None,
    invariant: bool = False,
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "T N H"]:
    """The reference's result; weights are rounded to q's dtype before they meet values.

    Raises:
      ValueError: a dtype, head width, page, soft cap or scale that the kernel does not take.
    """
    del k_scale, v_scale
    (T, N, H), (_, K, page, _) = q.shape, k_pages.shape
    (B, M), G = page_table.shape, N // K
    if reason := _misfit(q.dtype, k_pages.dtype, page, G, H, scale, soft_cap):
        raise ValueError(f"paged_attention: q{q.shape}, k_pages{k_pages.shape}: {reason}")
    config = config or CONFIGS[H]
    size = 1 if T <= B else TILE // G
    step = max(page, TILE)
    split = max(config.split // step, 1) * step if T <= B or invariant else UNSPLIT
    of = tiles(starts, lengths, T, size)
    sight = Sight(G, window)
    call = _Call(sight, page, scale, soft_cap, split, -(-M * page // split), config, interpret)
    packed = of.pack(q, K, 8)
    parts, lse = _kernel(
        call, packed, k_pages, v_pages, page_table, of.row, of.position, of.last, lengths
    )
    top = jnp.full((N,), -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    top = jnp.tile(top.reshape(K, G) * LOG2E, (1, size))
    top = jnp.pad(top, ((0, 0), (0, packed.shape[2] - top.shape[1])), constant_values=-jnp.inf)
    return of.unpack(_merge(parts, lse, *call.range_of_splits(of.position, of.last), top), q)


@dataclasses.dataclass(frozen=True)
class _Call:
    sight: Sight
    page: int
    scale: float
    soft_cap: float | None
    split: int
    splits: int
    config: Config
    interpret: Any

    def range_of_splits(self, position: Any, last: Any) -> tuple[Any, Any]:
        """The splits that hold a key which queries at `position` to `last` see."""
        return self.sight.oldest(position) // self.split, (last + self.split) // self.split

    def steps(self, split: Any, position: Any, last: Any) -> tuple[Any, Any]:
        """The runs of TILE keys of a split that they see."""
        of_split = self.split // TILE
        low = lax.max(split * of_split, lax.div(self.sight.oldest(position), TILE))
        return low, lax.min((split + 1) * of_split, lax.div(last + TILE, TILE))


def _merge(parts, lse, begin, end, top) -> Float[Array, "X K R H"]:
    """The splits' parts [X, splits, K, R, H] by their lse, base 2, from first to last, and sinks.

    `top`: the sinks in base 2, [K, R].
    """
    top = jnp.broadcast_to(top, lse[:, 0].shape)
    total = jnp.where(top == -jnp.inf, 0.0, 1.0)
    acc = jnp.zeros_like(parts[:, 0])
    for i in range(parts.shape[1]):
        live = ((begin <= i) & (i < end))[:, None, None]
        of_part = jnp.where(live, lse[:, i], -jnp.inf)
        highest = jnp.maximum(top, of_part)
        shift = jnp.where(highest == -jnp.inf, 0.0, highest)
        weight, shrink = jnp.exp2(of_part - shift), jnp.exp2(top - shift)
        part = jnp.where(live[..., None], parts[:, i], 0.0)
        acc = acc * shrink[..., None] + part * weight[..., None]
        total = total * shrink + weight
        top = highest
    return acc / jnp.where(total > 0, total, 1.0)[..., None]


def _kernel(call: _Call, packed, k_pages, v_pages, page_table, *of_tiles) -> Any:
    """parts [X, splits, K, R, H] and lse [X, splits, K, R] of packed tiles [X, K, R, H].

    R is at most TILE. Splits that no query of a tile sees stay unwritten.
    """
    slots, interpret = call.config.slots, call.interpret
    (X, K, R, H), dtype = packed.shape, packed.dtype
    page = min(call.page, TILE)  # places of a copy

    def kernel(
        q_gmem, k_gmem, v_gmem, table, rows, positions, lasts, lengths, parts_gmem, lse_gmem,
        q_smem, k_smem, v_smem, parts_smem, lse_smem, q_here, k_here, v_here, k_free, v_free,
    ):  # fmt: skip
        warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
        head = lax.rem(program, K)
        split = lax.rem(lax.div(program, K), call.splits)
        tile = lax.div(program, K * call.splits)
        row, position, last = rows[tile], positions[tile], lasts[tile]
        length = lengths[row]
        low, high = call.steps(split, position, last)

        @pl.when(jnp.logical_and(warpgroup == 1, low < high))
        def _copy():
            @pl.loop(low, high)
            def _(j):
                slot = lax.rem(j - low, slots)
                for gmem, smem, here, free in (
                    (k_gmem, k_smem, k_here, k_free),
                    (v_gmem, v_smem, v_here, v_free),
                ):

                    @pl.when(j - low >= slots)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for i in range(TILE // page):
                        # Past the last live copy that one once more: no other is the row's.
                        part = lax.min(j * (TILE // page) + i, lax.div(length - 1, page))
                        of_page = call.page // page
                        place = lax.rem(part, of_page) * page if of_page > 1 else 0
                        number = table[row, lax.div(part, of_page)]
                        there = smem.at[slot, pl.ds(i * page, page)]
                        keys = gmem.at[number, head, pl.ds(place, page)]
                        plgpu.copy_gmem_to_smem(keys, there, here.at[slot])

            # The last releases are waited for too: this warpgroup may not leave before the other.
            @pl.loop(0, lax.min(high - low, slots))
            def _(slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

        @pl.when(jnp.logical_and(warpgroup == 0, low < high))
        def _multiply():
            mine = pl.ds(0, R)
            plgpu.copy_gmem_to_smem(q_gmem.at[tile, head], q_smem.at[mine], q_here.at[0])
            plgpu.barrier_wait(q_here.at[0])

            def step(j, carry, edge):
                acc, top, total = carry
                slot = lax.rem(j - low, slots)
                plgpu.barrier_wait(k_here.at[slot])
                logits = product_with_transposed(q_smem, k_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(k_free.at[slot])
                unit = call.scale * LOG2E
                if call.soft_cap is not None:
                    # tanh(x) = 1 - 2 / (1 + e^2x); the chip's own tanh has eleven bits.
                    power = jnp.exp2(logits * (2 * unit / call.soft_cap))
                    logits, unit = 1 - 2 / (1 + power), call.soft_cap * LOG2E
                place, key = (_iota((TILE, TILE), axis, interpret) for axis in (0, 1))
                seen = call.sight.mask(place, key + (j * TILE - position))
                logits = jnp.where(seen, logits * unit, -jnp.inf)
                highest = jnp.maximum(top, jnp.max(logits, axis=1))
                shift = jnp.where(highest == -jnp.inf, 0.0, highest)
                weights = jnp.exp2(logits - lax.broadcast_in_dim(shift, logits.shape, (0,)))
                shrink = jnp.exp2(top - shift)
                total = total * shrink + jnp.sum(weights, axis=1)
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, (0,))
                acc, highest, total, weights = lax.optimization_barrier(
                    (acc, highest, total, weights.astype(dtype))
                )
                plgpu.barrier_wait(v_here.at[slot])
                if edge:
                    _zero_past(v_smem.at[slot], length - j * TILE, interpret)
                acc = add_product(acc, weights, v_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, highest, total

            top, total = (jnp.full((TILE,), x, jnp.float32) for x in (-jnp.inf, 0.0))
            carry = laid_out(jnp.zeros((TILE, H), jnp.float32), top, total, interpret=interpret)
            whole = lax.clamp(low, lax.div(length, TILE), high)
            carry = lax.fori_loop(low, whole, functools.partial(step, edge=False), carry)
            acc, top, total = lax.fori_loop(whole, high, functools.partial(step, edge=True), carry)

            some = total > 0
            total = jnp.where(some, total, 1.0)
            parts_smem[...] = acc * lax.broadcast_in_dim(1 / total, acc.shape, (0,))
            lse_smem[...] = jnp.where(some, top + jnp.log2(total), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(parts_smem.at[mine], parts_gmem.at[tile, split, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[mine], lse_gmem.at[tile, split, head])
            plgpu.wait_smem_to_gmem(0)

    def ring():
        return plgpu.SMEM((slots, TILE, H), dtype, transforms=SWIZZLED)

    def barriers(arrivals=1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((X, call.splits, K, R, H), jnp.float32),
            jax.ShapeDtypeStruct((X, call.splits, K, R), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((TILE, H), dtype, transforms=SWIZZLED),
            ring(),
            ring(),
            plgpu.SMEM((TILE, H), jnp.float32, transforms=SWIZZLED_32),
            plgpu.SMEM((TILE,), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=1),
            barriers(TILE // page),
            barriers(TILE // page),
            barriers(),
            barriers(),
        ],
        grid=(X * call.splits * K,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )(packed, k_pages, v_pages, page_table, *of_tiles)


def _zero_past(values: Any, live: Any, interpret: Any) -> None:
    """Makes rows of `values` from `live` on zeros: what they hold may be NaN, and 0 NaN is NaN."""
    held = values[...]
    values[...] = jnp.where(_iota(held.shape, 0, interpret) < live, held, jnp.zeros_like(held))
    plgpu.commit_smem()


def _iota(shape: tuple[int, int], axis: int, interpret: Any) -> Array:
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
