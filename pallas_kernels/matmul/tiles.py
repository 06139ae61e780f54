"""How 16-bit tiles lie in shared memory, and which shapes a ladder's step takes."""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array

# Rows of 64 16-bit numbers, 128 bytes, whose 16-byte pieces are permuted by row: the tensor cores
# then read eight rows at once and no two from the same bank.
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

# The same 128 bytes a row of 32-bit numbers.
SWIZZLED_32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def swizzled(columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The same for tiles of 16-bit numbers with fewer than 64 columns: 16 or 32."""
    columns = min(columns, 64)
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


def check(a: Array, b: Array, tile_m: int, tile_n: int, tile_k: int) -> None:
    """Raises ValueError where a and b are not what a step of the ladder takes."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: a{a.shape} and b{b.shape}; want [M, K] and [K, N]")
    if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"matmul: {a.dtype} and {b.dtype}; want both bfloat16 or both float16")
    (M, K), N = a.shape, b.shape[1]
    for name, size, tile in (("M", M, tile_m), ("N", N, tile_n), ("K", K, tile_k)):
        if size % tile:
            raise ValueError(f"matmul: {name}={size} is not a multiple of {tile}")
