"""Matrix multiplication by a Triton kernel through jax-triton, from compute capability 8.0 on.

Cost: 2 M N K FLOPs; the tiles and their order are in `triton_source.py`. It has no derivative.
XLA neither batches nor partitions the call: no `vmap`, and shards through `shard_map`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _triton_compat


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A tile of the product, the step along K, rows of tiles walked together, launch options."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int


SMALL = Tiles(64, 64, 64, 8, 4, 3)  # where larger tiles would leave multiprocessors idle
LARGE = {  # by the least compute capability
    80: Tiles(128, 128, 32, 8, 4, 4),
    90: Tiles(128, 256, 64, 8, 8, 3),
    120: Tiles(128, 128, 32, 8, 4, 4),
}
FEW = 64  # large tiles that do not fill a GPU


def refusal(*, platform: str, dtype) -> str | None:
    """Why Triton cannot multiply these matrices, or None if it can; all shapes are taken."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    return _triton_compat.refusal(platform)


def tiles(M: int, N: int) -> Tiles:
    """The tiles for a product [M, N] on this GPU."""
    capability = _triton_compat.capability()
    large = LARGE[max(least for least in LARGE if least <= capability)]
    return SMALL if _count(M, N, large) < FEW else large


def matmul(a: Float[Array, "M K"], b: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """a @ b of bfloat16 or float16, summed in float32; M, N and K of any size.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: a{a.shape} and b{b.shape}; want [M, K] and [K, N]")
    if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"matmul: {a.dtype} and {b.dtype}; want both bfloat16 or both float16")
    from pallas_kernels.matmul import triton_source

    (M, K), N = a.shape, b.shape[1]
    chosen = tiles(M, N)
    (out,) = _triton_compat.call(
        triton_source.matmul,
        [a, b],
        [jax.ShapeDtypeStruct((M, N), a.dtype)],
        programs=_count(M, N, chosen),
        M=M,
        N=N,
        K=K,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        GROUP=chosen.group,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out


def _count(M: int, N: int, tile: Tiles) -> int:
    return -(-M // tile.block_m) * -(-N // tile.block_n)
