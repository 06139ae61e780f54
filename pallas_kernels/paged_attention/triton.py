"""Attention over pages by Triton kernels through jax-triton, for NVIDIA GPUs from 8.0 on.

One launch takes decode steps, chunks of prompts and both together. Where T <= B, and for
`invariant`, keys are split in runs of SPLIT, whose parts a second launch adds up in their order;
otherwise a program goes through all keys that its queries see: a prompt has programs enough.

Cost: each key and value that a block of queries sees is read once, pages that it does not see are
not; 4 H FLOPs a pair of query head and key, in tiles that a decode step fills to G rows of 16.
Splits write and read 4 N H T bytes each, beside the 4 K H SPLIT bytes an element of two bytes has
of keys and values: with G = 8, 3 %.

A row's bits depend neither on other rows nor on B, M or P: splits begin at fixed positions. For
`invariant`, tiles and splits are the same ones in every call, so that how a prompt was chunked
does not matter either; chunks of prompts then pay for the splits.

One H200, bfloat16, heads 16/8 of 128, pages of 16 in random order (`python -m
jaxinfra.kernels.paged_bench`): 4.15 TB/s of keys and values for 256 rows of 100 to 2,048 tokens,
4.19 for 16 rows of 16,384 (a copy of the same run moves 3.64), 2.60 for one such row, whose 26 us
are short for two launches. Eight chunks of 256 queries at 1,024 to 4,096 tokens take 147 us. The
schedule is in `triton_source.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import _triton_compat
from pallas_kernels.paged_attention.pages import LARGEST

WIDTHS = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Config:
    """Keys a split, about; bytes of keys a tile; warps and pipeline stages of a program."""

    split: int = 512
    tile: int = 2**14
    warps: int = 4
    stages: int = 3


DECODE, CHUNKS = Config(tile=2**15, stages=2), Config()  # the best of nine, above


def refusal(
    *,
    platform: str,
    dtype,
    pages_dtype,
    H: int,
    scale: float = 1.0,
    soft_cap: float | None = None,
    **_others,
) -> str | None:
    """Why Triton cannot take this call, or None if it can."""
    misfit = _misfit(dtype, pages_dtype, H, scale, soft_cap)
    if reason := misfit or _triton_compat.refusal(platform):
        return reason
    capability = _triton_compat.capability()
    if jnp.dtype(pages_dtype).name == "float8_e4m3fn" and capability < 89:
        return f"pages of float8_e4m3fn need compute capability 8.9 or more, not {capability / 10}"
    return None


def _misfit(dtype, pages_dtype, H: int, scale: float, soft_cap: float | None) -> str | None:
    dtype, pages_dtype = jnp.dtype(dtype), jnp.dtype(pages_dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the kernels take bfloat16, float16 and float32, not {dtype.name}"
    if pages_dtype != dtype and pages_dtype.name not in LARGEST:
        return f"the kernels take pages of {dtype.name} or quantised ones, not {pages_dtype.name}"
    if H not in WIDTHS:
        return f"the kernels take a head width of {', '.join(map(str, WIDTHS))}, not {H}"
    if scale <= 0:
        return f"the kernels take a scale above zero, not {scale}"
    if soft_cap is not None and soft_cap <= 0:
        return f"the kernels take a soft cap above zero, not {soft_cap}"
    return None


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P K page H"],
    v_pages: Num[Array, "P K page H"],
    page_table: Int[Array, "B M"],
    starts: Int[Array, " B+1"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "P K page"] | None = None,
    v_scale: Float[Array, "P K page"] | None = None,
    invariant: bool = False,
    config: Config | None = None,
) -> Float[Array, "T N H"]:
    """The reference's result; weights are rounded to q's dtype before they meet values.

    Raises:
      ValueError: a dtype, a head width, a soft cap or a scale that the kernels do not take.
    """
    from pallas_kernels.paged_attention import triton_source

    (T, N, H), (_, K, page, _) = q.shape, k_pages.shape
    B, M = page_table.shape
    if reason := _misfit(q.dtype, k_pages.dtype, H, scale, soft_cap):
        raise ValueError(f"paged_attention: q{q.shape}, k_pages{k_pages.shape}: {reason}")
    decode = T <= B and not invariant
    config = config or (DECODE if decode else CHUNKS)
    split = max(config.split // page, 1) * page
    splits = -(-M * page // split) if decode or invariant else 1
    rows, keys = _tiles(N // K, H * q.dtype.itemsize, decode, config)
    sink = q if sinks is None else sinks.astype(jnp.float32)
    shape = jax.ShapeDtypeStruct
    out = shape(q.shape, q.dtype)
    parts = shape((splits, *q.shape), jnp.float32) if splits > 1 else out
    made, lse = _triton_compat.call(
        triton_source.attend,
        [q, k_pages, v_pages, q if k_scale is None else k_scale, q if v_scale is None else v_scale,
         page_table, starts, lengths, sink, T, B, M],
        [parts, shape((splits, T, N) if splits > 1 else (1,), jnp.float32)],
        programs=(T // (rows // (N // K)) + B + 1) * splits * K,
        N=N, K=K, H=H, PAGE=page, SCALE=scale, SOFT_CAP=soft_cap, WINDOW=window,
        QUANTISED=k_scale is not None, SINKS=sinks is not None, SPLITS=splits, SPLIT=split,
        BLOCK_M=rows, BLOCK_KV=keys, PRECISION="ieee" if q.dtype == jnp.float32 else "tf32",
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits == 1:
        return made
    (merged,) = _triton_compat.call(
        triton_source.merge,
        [made, lse, starts, lengths, sink, T, B],
        [out],
        programs=T * N,
        N=N, H=H, WINDOW=window, SINKS=sinks is not None, SPLIT=split,
        num_warps=1, num_stages=1,
    )  # fmt: skip
    return merged


def _tiles(G: int, row: int, decode: bool, config: Config) -> tuple[int, int]:
    """Rows (queries times heads of a group) and keys, of `row` bytes each, of a tile."""
    rows = max(16 if decode else 64, 1 << (G - 1).bit_length())
    return rows, max(16, min(128, config.tile // row))
