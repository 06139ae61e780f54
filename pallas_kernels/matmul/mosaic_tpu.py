"""Matrix multiplication on a TPU: a grid of tiles, each summed in float32 in vector memory.

The pipeline that Pallas makes around the body fetches the next pieces of a and b while this one is
multiplied. Blocks at an edge reach past the arrays and hold anything there, NaN included: rows of a
and columns of b only spoil sums that are not stored; the edge along K is masked in both.

Cost: 2 M N K FLOPs; a is read ceil(N / tile.n) times and b ceil(M / tile.m) times. A tile of m x n
makes 2 m n / (itemsize (m + n)) FLOPs from each byte it fetches, and a chip keeps its matrix units
busy from peak FLOPs / bandwidth on (bfloat16: v5e 240, v5p 166, v6e 560); `tiles_for` takes the
smallest tile that is well above that and fits the chip's vector memory, of which a kernel is given
16 MiB (v5e, v5p) or 32 MiB (v6e) where it does not ask for more, as this one does.
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
from jaxtyping import Array, Float

LANES = 128
DTYPES = (jnp.bfloat16, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One step of the grid: m x k of a times k x n of b."""

    m: int
    n: int
    k: int

    def vmem(self, itemsize: int) -> int:
        """Bytes of vector memory: two slots of a, b and the output, the sums and their addend."""
        slots = 2 * itemsize * (self.m * self.k + self.k * self.n + self.m * self.n)
        return slots + 2 * 4 * self.m * self.n

    def intensity(self, itemsize: int) -> float:
        """FLOPs made from each byte of a and b that is fetched."""
        return 2 * self.m * self.n / (itemsize * (self.m + self.n))


def tiles_for(M: int, N: int, K: int, dtype, chip: pltpu.TpuInfo) -> Tiles:
    """The smallest tile with 1.2 times the FLOPs a byte that `chip` needs, in half its memory."""
    itemsize = jnp.dtype(dtype).itemsize
    # The units multiply 16-bit numbers; a float32 product takes six passes (precision "highest").
    peak = chip.bf16_ops_per_second / (6 if itemsize == 4 else 1)
    enough = 1.2 * peak / chip.mem_bw_bytes_per_second
    whole = [-(-size // LANES) * LANES for size in (M, N, K)]
    fitting = []
    for m, n, k in ((m, n, k) for m in _SIZES for n in _SIZES for k in _SIZES):
        tiles = Tiles(*map(min, (m, n, k), whole))
        if tiles.vmem(itemsize) <= chip.vmem_capacity_bytes // 2:
            fitting.append(tiles)
    good = [tiles for tiles in fitting if tiles.intensity(itemsize) >= enough]
    if good:
        return min(good, key=lambda tiles: (tiles.m * tiles.n, abs(tiles.m - tiles.n), -tiles.k))
    return max(fitting, key=lambda tiles: (tiles.intensity(itemsize), tiles.k))


_SIZES = (256, 512, 1024, 2048)


def refusal(*, platform: str, dtype) -> str | None:
    """Why these kernels cannot take such a product, or None if they can."""
    if platform != "tpu":
        return f"the TPU's kernels need a TPU, and arrays are on {platform}"
    if dtype not in DTYPES:
        return f"the TPU's kernels take bfloat16 and float32, not {jnp.dtype(dtype).name}"
    return None


def matmul(
    a: Float[Array, "M K"],
    b: Float[Array, "K N"],
    *,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """a @ b in a's dtype, summed in float32; any M, N and K.

    Args:
      a, b: both bfloat16 or both float32 (whose products are then exact to float32).
      tiles: sizes that are multiples of 128; None chooses by the chip, or for a v5e without one.
      interpret: `pltpu.InterpretParams(...)` runs it on a CPU.

    Raises:
      ValueError: shapes that do not multiply, another dtype, or tiles that are no multiples of 128.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul: a{a.shape} and b{b.shape}; want [M, K] and [K, N]")
    if a.dtype != b.dtype or a.dtype not in DTYPES:
        raise ValueError(f"matmul: {a.dtype} and {b.dtype}; want both bfloat16 or both float32")
    (M, K), N = a.shape, b.shape[1]
    if 0 in (M, N, K):
        raise ValueError(f"matmul: a{a.shape} and b{b.shape} hold an axis of length 0")
    if tiles is None:
        on_tpu = pltpu.is_tpu_device()
        v5e = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)
        tiles = tiles_for(M, N, K, a.dtype, pltpu.get_tpu_info() if on_tpu else v5e)
    if tiles.m % LANES or tiles.n % LANES or tiles.k % LANES:
        raise ValueError(f"matmul: {tiles} are not multiples of {LANES}")
    m, n, k = min(tiles.m, M), min(tiles.n, N), min(tiles.k, K)
    itemsize = a.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, K=K),
        out_shape=jax.ShapeDtypeStruct((M, N), a.dtype),
        grid=(pl.cdiv(M, m), pl.cdiv(N, n), pl.cdiv(K, k)),
        in_specs=[
            pl.BlockSpec((m, k), lambda i, j, step: (i, step)),
            pl.BlockSpec((k, n), lambda i, j, step: (step, j)),
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, step: (i, j)),
        scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=2 * tiles.vmem(itemsize),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            bytes_accessed=itemsize * (M * K * pl.cdiv(N, n) + K * N * pl.cdiv(M, m) + M * N),
            transcendentals=0,
        ),
        name="matmul",
        interpret=interpret,
    )(a, b)


def _kernel(a_ref, b_ref, out_ref, sums, *, K: int):
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    k = a_ref.shape[1]

    @pl.when(step == 0)
    def _start():
        sums[...] = jnp.zeros_like(sums)

    def add(a, b):
        exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        sums[...] += jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)

    if K % k == 0:
        add(a_ref[...], b_ref[...])
    else:

        @pl.when(step < last)
        def _inner():
            add(a_ref[...], b_ref[...])

        @pl.when(step == last)
        def _edge():
            add(_existing(a_ref[...], 1, K % k), _existing(b_ref[...], 0, K % k))

    @pl.when(step == last)
    def _store():
        out_ref[...] = sums[...].astype(out_ref.dtype)


def _existing(block: Array, axis: int, size: int) -> Array:
    """The block with zeros from `size` on along an axis."""
    exist = lax.broadcasted_iota(jnp.int32, block.shape, axis) < size
    return jnp.where(exist, block, jnp.zeros_like(block))
