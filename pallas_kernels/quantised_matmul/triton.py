"""Few rows times weights of 8 or 4 bits by a Triton kernel, from compute capability 8.0 on.

Bound by the bytes of the weights: 1 or 1/2 a number in place of 2. K is split among programs so
that a GPU is full, and XLA adds the splits up; their order is fixed.

One H200 (`jaxinfra kernels bench quantised`), 16 rows times [4,096, 4,096]: 10.6 us with 8 bits and
12.2 with 4, where XLA, which writes the weights out as floats first, takes 25.0 and 32.9 and a
product with bfloat16 weights 10.8. 64 rows: 20.5 and 17.0, XLA 28.7 and 36.4, bfloat16 14.6: it
spares memory there, no time. A lone row is faster by XLA's multiply-and-sum, so a choice leaves it.

No derivative; XLA neither batches nor partitions the call: no `vmap`, and shards through
`shard_map`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from pallas_kernels import _triton_compat

MOST_ROWS = 64
_WAVES = 512  # programs that fill a GPU several times over


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Outputs and numbers of K a step, splits of K (None: as many as fill a GPU), launch options.

    `block_k` is the most: a step is no longer than a group.
    """

    block_n: int = 64
    block_k: int = 128
    splits: int | None = None
    num_warps: int = 4
    num_stages: int = 4


def choose(rows: int, N: int, bits: int) -> Tiles:
    """The fastest of four on an H200, of 16 rows and of 64; fewer splits where N is large."""
    if bits == 4:
        return Tiles(128, 128, _splits(8, 256, N, 128), num_warps=8)
    if rows <= 32:
        return Tiles(32, 128, _splits(4, 512, N, 32))
    return Tiles(64, 128, _splits(8, 512, N, 64))


def _splits(most: int, programs: int, N: int, block_n: int) -> int:
    return min(most, max(1, programs // -(-N // block_n)))


def refusal(*, platform: str, dtype, rows: int, group: int) -> str | None:
    """Why Triton cannot multiply `rows` rows of `dtype`, or None if it can."""
    return _misfit(dtype, rows, group) or _triton_compat.refusal(platform)


def _misfit(dtype, rows: int, group: int) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes rows of bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if rows > MOST_ROWS:
        return f"the kernel takes up to {MOST_ROWS} rows, not {rows}"
    if group % 32:
        return f"the kernel takes groups of a multiple of 32, not {group}"
    return None


def weight_matmul(
    x: Float[Array, "M K"],
    values: Int8[Array, "g N n"] | UInt8[Array, "g N m"],
    scales: Float[Array, "g N"],
    *,
    dtype: Any = None,
    tiles: Tiles | None = None,
) -> Float[Array, "M N"]:
    """The specification's result in `dtype` or x's, summed in float32.

    Raises ValueError: a dtype, number of rows or group that the kernel does not take.
    """
    (M, K), (groups, N, _) = x.shape, values.shape
    if reason := _misfit(x.dtype, M, K // groups):
        raise ValueError(f"weight_matmul: x{x.shape}, values{values.shape}: {reason}")
    from pallas_kernels.quantised_matmul import triton_source

    bits = 8 if values.dtype == jnp.int8 else 4
    tiles = tiles or choose(M, N, bits)
    block_k = next(n for n in (256, 128, 64, 32) if n <= tiles.block_k and K // groups % n == 0)
    across = -(-N // tiles.block_n)
    splits = min(tiles.splits or max(_WAVES // across, 1), K // block_k)
    out = jax.ShapeDtypeStruct((M, N), dtype or x.dtype)
    if splits > 1:
        out = jax.ShapeDtypeStruct((splits, M, N), jnp.float32)
    (made,) = _triton_compat.call(
        triton_source.weight_matmul,
        [x, values, scales.astype(jnp.float32)],
        [out],
        programs=splits * across,
        M=M,
        N=N,
        K=K,
        GROUP=K // groups,
        BITS=bits,
        BLOCK_M=max(16, 1 << (M - 1).bit_length()),
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        SPLITS=splits,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return jnp.sum(made, axis=0).astype(dtype or x.dtype) if splits > 1 else made
