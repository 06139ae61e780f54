"""Products of float8_e4m3fn on Hopper, promoted to float32 every 128 of K.

The tensor cores sum products of 8-bit floats in fewer bits than float32 has, so a sum lives there
for 128 of K only; then it is scaled and added to float32 sums in ordinary registers (DeepGEMM's
way). Two warpgroups share a tile of 128 rows, and while one adds the other's products go on; a
third copies into a ring of slots, persistent over tiles.

Scales are one a tensor, which is left to the end, or as DeepGEMM has them: of a, one for every row
and 128 of K; of b, one for every 128 x 128. The former travel in the ring, the latter are read one
at a time, and a tile's columns are held 64 at a time, which no block's edge parts.

Cost: 2 M N K FLOPs at twice the rate of 16-bit floats, 2 M N K / 128 in ordinary registers; a is
read N / tile_n times and b M / 128 times, from the L2 cache where bands keep them there.

One H200, 4,096 cubed (`python -m jaxinfra.kernels.quantised_bench`): 1,202 TFLOP/s with a scale a
tensor, where XLA's float8 reaches 1,130 and bfloat16 785; 1,088 with a scale a block, where XLA
reaches 611. No derivative.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _compat
from pallas_kernels.matmul.tiles import SWIZZLED
from pallas_kernels.mma import laid_out, product_with_transposed, reads_end
from pallas_kernels.quantised_matmul.formats import BLOCK

TILE_M = 128
PIECE = 64  # columns that are held, and stored, at a time

# Rows of 128 8-bit numbers, 128 bytes, permuted as `matmul.tiles` says.
SWIZZLED_8 = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Config:
    """128 x `tile_n` sums a block, `band` tiles across at a time.

    The blocks of a cluster make tiles one below the other and fetch their columns of b once.
    """

    tile_n: int = 128
    slots: int = 5
    band: int = 8
    cluster: int = 1

    @property
    def shared_memory(self) -> int:
        """Bytes of a block's slots, with scales, and of what its warpgroups store."""
        slot = (TILE_M + self.tile_n) * BLOCK + 4 * TILE_M
        return self.slots * slot + 2 * 2 * 2 * PIECE * PIECE


def choose(M: int, *, blocked: bool) -> Config:
    """The schedule for M rows: what was fastest at 4,096 cubed on an H200."""
    if not blocked:
        return Config(192, slots=4)
    return Config(128, cluster=2 if M > TILE_M else 1)


def fp8_matmul(
    a: Float[Array, "M K"],
    b: Float[Array, "N K"],
    a_scale: Float[Array, "k M"] | Float[Array, " 1"],
    b_scale: Float[Array, "n k"] | None,
    *,
    dtype: Any,
    config: Config,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """a @ b^T times its scales, as 16-bit `dtype`; a and b float8_e4m3fn.

    With b_scale, a_scale is [K / 128, M] and b_scale one a block; without, a_scale is the product
    of the two tensors' scales. M is a multiple of 8, N of 64, K of 128 (`pallas_kernels.fp8_matmul`
    pads).
    """
    c = config
    (M, K), N = a.shape, b.shape[0]
    blocked = b_scale is not None
    tiles, steps = (-(-M // (TILE_M * c.cluster)), -(-N // c.tile_n)), K // BLOCK
    clusters = max(1, _compat.multiprocessors(interpret) // c.cluster)
    pieces = c.tile_n // PIECE
    operands = [a, b, a_scale, *([b_scale] if blocked else [])]

    def kernel(*refs):
        a_gmem, b_gmem, a_scale_gmem = refs[:3]
        b_scale_gmem: Any = refs[3] if blocked else None
        out_gmem, a_smem, b_smem, scale_smem, out_smem, arrived, free = refs[len(operands) :]
        warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        mine = lax.div(tiles[0] * tiles[1] - cluster + clusters - 1, clusters)

        def place(i):
            """First row and first column of this block's tile number i."""
            m, n = plgpu.planar_snake(cluster + i * clusters, tiles, 1, c.band)
            m = m * c.cluster + lax.axis_index("member") if c.cluster > 1 else m
            return m * TILE_M, n * c.tile_n

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _(i):
                m, n = place(i)
                rows = pl.ds(m, TILE_M)

                @pl.loop(0, steps)
                def _(k):
                    slot = lax.rem(i * steps + k, c.slots)

                    @pl.when(i * steps + k >= c.slots)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    ks, here = pl.ds(k * BLOCK, BLOCK), arrived.at[slot]
                    plgpu.copy_gmem_to_smem(a_gmem.at[rows, ks], a_smem.at[slot], here)
                    columns = pl.ds(n, c.tile_n)
                    plgpu.copy_gmem_to_smem(
                        b_gmem.at[columns, ks], b_smem.at[slot], here,
                        collective_axes="member" if c.cluster > 1 else None,
                    )  # fmt: skip
                    if blocked:
                        scales = a_scale_gmem.at[k, rows]
                        plgpu.copy_gmem_to_smem(scales, scale_smem.at[slot], here)

            # The last releases are waited for too: this warpgroup may not leave before the others.
            @pl.loop(lax.max(0, mine * steps - c.slots), mine * steps)
            def _(done):
                plgpu.barrier_wait(free.at[lax.rem(done, c.slots)])

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            my_rows = pl.ds(warpgroup * 64, 64)

            def piece_of(values, j):
                return values[:, j * PIECE : (j + 1) * PIECE]

            @pl.loop(0, mine)
            def _(i):
                m, n = place(i)

                def step(k, totals):
                    slot = lax.rem(i * steps + k, c.slots)
                    scales = []
                    if blocked:  # asked for before the wait, which hides how long they take
                        last = b_scale_gmem.shape[0] - 1
                        scales = [
                            b_scale_gmem[lax.min(lax.div(n + j * PIECE, BLOCK), last), k]
                            for j in range(pieces)
                        ]
                    plgpu.barrier_wait(arrived.at[slot])
                    part = product_with_transposed(
                        a_smem.at[slot, my_rows], b_smem.at[slot], interpret=interpret
                    )
                    parts = [piece_of(part, j) for j in range(pieces)]
                    if blocked:
                        of_row = _compat.load_plainly(scale_smem.at[slot, my_rows], interpret)
                        parts = [
                            part * lax.broadcast_in_dim(of_row * scale, part.shape, (0,))
                            for part, scale in zip(parts, scales, strict=True)
                        ]
                    reads_end(a_smem.at[slot, my_rows], b_smem.at[slot], interpret=interpret)
                    plgpu.barrier_arrive(free.at[slot])
                    return tuple(t + p for t, p in zip(totals, parts, strict=True))

                zero = jnp.zeros((64, PIECE), jnp.float32)
                totals = tuple(laid_out(zero, interpret=interpret)[0] for _ in range(pieces))
                totals = lax.fori_loop(0, steps, step, totals)
                for j, total in enumerate(totals):
                    if not blocked:
                        total = total * a_scale_gmem[0]
                    piece = out_smem.at[warpgroup, j % 2]
                    # An odd number of pieces: the last tile's last one left from the same place.
                    plgpu.wait_smem_to_gmem(min(j, 1), wait_read_only=True)
                    piece[...] = total.astype(out_gmem.dtype)
                    plgpu.commit_smem()
                    rows, columns = pl.ds(m + warpgroup * 64, 64), pl.ds(n + j * PIECE, PIECE)
                    plgpu.copy_smem_to_gmem(piece, out_gmem.at[rows, columns])

            plgpu.wait_smem_to_gmem(0)

    if c.cluster > 1:
        free = plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=2, num_barriers=c.slots
        )
        mesh = {"cluster": (c.cluster,), "cluster_names": ("member",)}
    else:
        free, mesh = plgpu.Barrier(num_arrivals=2, num_barriers=c.slots), {}
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        scratch_types=[
            plgpu.SMEM((c.slots, TILE_M, BLOCK), a.dtype, transforms=SWIZZLED_8),
            plgpu.SMEM((c.slots, c.tile_n, BLOCK), b.dtype, transforms=SWIZZLED_8),
            plgpu.SMEM((c.slots, TILE_M), jnp.float32),
            plgpu.SMEM((2, 2, 64, PIECE), dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=3 if blocked else 2, num_barriers=c.slots),
            free,
        ],
        grid=(clusters,),
        grid_names=("cluster",),
        **mesh,
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(*operands)
