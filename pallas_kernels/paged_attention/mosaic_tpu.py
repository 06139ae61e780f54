"""Attention over pages on a TPU: online softmax over runs of keys that are copied page by page.

The grid has one axis, of tiles: the query heads of one query (T <= B) or of about ROWS / G of one
row. A tile goes through the keys that its queries see, about KEYS at a time, all key heads of a
page in one copy; while one run is worked on the next is copied into the other half of a buffer.
Pages that no query of the tile sees are not read. A core does one tile after another, so that keys
are not split. Softmax is in base 2: scale and log2(e) are one multiplication.

Cost: 4 H FLOPs of each pair of a row of a tile and a key in its runs; keys and values are read once
a tile. A tile's first run is waited for: the copies of two tiles do not overlap.

A row's bits depend neither on other rows nor on B, M or P: runs begin at fixed positions. Tiles of
one query and of several may be multiplied differently; for `invariant` every call takes the
latter, whose rows a decode step leaves nearly all empty.

Not yet timed on a chip, and so never chosen unasked. Pages are not quantised here.
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

from pallas_kernels.flash_attention.mosaic_tpu_blocks import LANES, LOG2E, product, spread
from pallas_kernels.paged_attention.rows import Sight, tiles

ROWS, KEYS = 128, 128
WIDTHS = (64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float32)


def refusal(
    *,
    platform: str,
    dtype,
    pages_dtype,
    page: int,
    N: int,
    K: int,
    H: int,
    **_others,
) -> str | None:
    """Why the kernel cannot take this call, or None if it can."""
    if platform != "tpu":
        return f"the TPU's kernel needs a TPU, and arrays are on {platform}"
    return _misfit(dtype, pages_dtype, page, N // K, H)


def _misfit(dtype, pages_dtype, page: int, G: int, H: int) -> str | None:
    if dtype not in DTYPES:
        return f"the TPU's kernel takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if pages_dtype != dtype:
        return f"the TPU's kernel takes pages of q's dtype, not {jnp.dtype(pages_dtype).name}"
    if H not in WIDTHS:
        return f"the TPU's kernel takes a head width of {', '.join(map(str, WIDTHS))}, not {H}"
    if page % 16 or (LANES % page and page % LANES):
        return f"the TPU's kernel takes pages of 16, 32, 64 or a multiple of 128 places, not {page}"
    if G > ROWS:
        return f"the TPU's kernel takes up to {ROWS} query heads a key head, not {G}"
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
    interpret: Any = False,
) -> Float[Array, "T N H"]:
    """The reference's result; weights are rounded to q's dtype before they meet values.

    Args:
      interpret: `pltpu.InterpretParams(...)` runs it on a CPU.

    Raises:
      ValueError: a dtype, head width or page that the kernel does not take.
    """
    del k_scale, v_scale
    (T, N, H), (_, K, page, _) = q.shape, k_pages.shape
    G = N // K
    if reason := _misfit(q.dtype, k_pages.dtype, page, G, H):
        raise ValueError(f"paged_attention: q{q.shape}, k_pages{k_pages.shape}: {reason}")
    decode = lengths.shape[0] >= T and not invariant
    size = 1 if decode else max(ROWS // G, 1)
    of = tiles(starts, lengths, T, size)
    packed = of.pack(q, K, 16)
    top = jnp.full((N,), -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    top = jnp.tile(top.reshape(K, G) * LOG2E, (1, size))
    top = jnp.pad(top, ((0, 0), (0, packed.shape[2] - top.shape[1])), constant_values=-jnp.inf)
    top = jnp.broadcast_to(top[..., None], (*top.shape, LANES))
    call = _Call(Sight(G, window), scale, soft_cap, page, max(KEYS // page, 1), interpret)
    scalars = (of.row, of.position, of.last, lengths, page_table)
    return of.unpack(_tiles(call, scalars, packed, top, k_pages, v_pages), q)


@dataclasses.dataclass(frozen=True)
class _Call:
    sight: Sight
    scale: float
    soft_cap: float | None
    page: int
    pages: int  # of a run
    interpret: Any

    @property
    def run(self) -> int:
        """Keys of a run."""
        return self.pages * self.page

    def logits(self, products: Array) -> Array:
        """Logits in base 2 from q k^T."""
        if self.soft_cap is None:
            return products * (self.scale * LOG2E)
        return jnp.tanh(products * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2E)


def _tiles(call: _Call, scalars, packed, top, k_pages, v_pages) -> Float[Array, "X K R H"]:
    X, K, R, H = packed.shape
    tile = pl.BlockSpec((None, K, R, H), lambda x, *_: (x, 0, 0, 0))
    buffer = pltpu.VMEM((2, call.pages, K, call.page, H), packed.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, call),
        out_shape=jax.ShapeDtypeStruct(packed.shape, packed.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(X,),
            in_specs=[
                tile,
                pl.BlockSpec((K, R, LANES), lambda x, *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=tile,
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.VMEM((K, R, H), jnp.float32),
                pltpu.VMEM((K, R, LANES), jnp.float32),
                pltpu.VMEM((K, R, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="paged_attention",
        interpret=call.interpret,
    )(*scalars, packed, top, k_pages, v_pages)


def _kernel(
    call: _Call, rows, positions, lasts, lengths, table, q_ref, sinks_ref, k_hbm, v_hbm, out_ref,
    k_buffer, v_buffer, arrived, sums, top, total,
):  # fmt: skip
    x = pl.program_id(0)
    row, position, last = rows[x], positions[x], lasts[x]
    length = lengths[row]
    low = lax.div(call.sight.oldest(position), call.run)
    high = lax.div(last + call.run, call.run)

    def copies(j):
        """Those of run j; past the row's last page that one once more: no other is the row's."""
        half = lax.rem(j, 2)
        for i in range(call.pages):
            number = table[row, lax.min(j * call.pages + i, lax.div(length - 1, call.page))]
            for which, (hbm, buffer) in enumerate(((k_hbm, k_buffer), (v_hbm, v_buffer))):
                yield pltpu.make_async_copy(
                    hbm.at[number], buffer.at[half, i], arrived.at[half, which]
                )

    def begin(j):
        for copy in copies(j):
            copy.start()

    pl.when(low < high)(lambda: begin(low))
    top[...] = sinks_ref[...]
    total[...] = jnp.where(sinks_ref[...] == -jnp.inf, 0.0, 1.0)
    sums[...] = jnp.zeros_like(sums)

    @pl.loop(low, high)
    def _(j):
        half = lax.rem(j, 2)
        pl.when(j + 1 < high)(lambda: begin(j + 1))
        for copy in copies(j):
            copy.wait()
        for head in range(q_ref.shape[0]):
            k = k_buffer[half, :, head].reshape(call.run, -1)
            v = v_buffer[half, :, head].reshape(call.run, -1)
            logits = call.logits(product(q_ref[head], k, 1, 1))
            place, key = (lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
            seen = call.sight.mask(place, key + (j * call.run - position))
            logits = jnp.where(seen, logits, -jnp.inf)
            # Places past the row's end may hold NaN, which a weight of zero would not undo.
            live = lax.broadcasted_iota(jnp.int32, v.shape, 0) + j * call.run < length
            v = jnp.where(live, v, jnp.zeros_like(v))
            before = top[head]
            highest = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            shift = jnp.where(highest == -jnp.inf, 0.0, highest)
            weights = jnp.exp2(logits - spread(shift, logits.shape[1]))
            shrink = jnp.exp2(before - shift)
            added = product(weights.astype(v.dtype), v, 1, 0)
            sums[head] = sums[head] * spread(shrink, v.shape[1]) + added
            total[head] = total[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            top[head] = highest

    for head in range(q_ref.shape[0]):
        whole = jnp.where(total[head] > 0, total[head], 1.0)
        out_ref[head] = (sums[head] / spread(whole, sums.shape[2])).astype(out_ref.dtype)
