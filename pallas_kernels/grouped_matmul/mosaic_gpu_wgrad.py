"""The gradient of a grouped product's matrices on Hopper: of each group, x^T dy over its rows.

A tile is 128 x 192, say, of one group's matrix, summed over the group's rows `tile_k` at a time.
The first step of a group may have rows of the group before it and the last of the one after, or
rows that nobody filled: in those steps rows of others are set to zero in shared memory, in x and in
dy, for zero times NaN is NaN. A group without rows takes no step and gives zeros.

Cost: 2 M K N FLOPs and those of up to 7 + tile_k rows a group; x is read once for each tile of
columns and dy once for each of rows, from the L2 cache, which holds a group's; G K N written.

One H200, bfloat16, 128 groups of 65,536 rows, 2,048 x 768: 529 TFLOP/s, where XLA's reaches 4;
8 groups of 16,384 rows, 4,096 x 14,336: 748, where XLA's reaches 91 and a product a group 582.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import _compat
from pallas_kernels.grouped_matmul import ping_pong
from pallas_kernels.grouped_matmul.ping_pong import STORED, Config
from pallas_kernels.grouped_matmul.schedule import in_bands, last_begin, row_steps
from pallas_kernels.matmul.tiles import swizzled


def wgrad(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    counts: Int[Array, " G"],
    *,
    config: Config,
    interpret: Any = False,
) -> Float[Array, "G K N"]:
    """x_g^T dy_g of each group's rows, 16-bit floats summed in float32, rounded once to x's dtype.

    M is a multiple of 8, K and N are of 64 (`pallas_kernels.grouped_matmul` pads).
    """
    c = config
    (M, K), N, G = x.shape, dy.shape[1], len(counts)
    steps = row_steps(counts, M, c.tile_k)
    down, across = -(-K // c.tile_m), -(-N // c.tile_n)
    blocks = _compat.multiprocessors(interpret)
    width = min(STORED, c.tile_n)

    def kernel(
        x_gmem, dy_gmem, start, end, begin, number, out_gmem, a_smem, b_smem, out_smem, *barriers
    ):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        ring = ping_pong.Ring(a_smem, b_smem, *barriers, transpose_a=True, interpret=interpret)
        mine = lax.div(G * down * across - block + blocks - 1, blocks)

        def place(i):
            """Group, and the tile's row and column in its matrix."""
            tile = block + i * blocks
            g = lax.div(tile, down * across)
            return g, *in_bands(tile - g * (down * across), down, across, c.band)

        def steps_of(i):
            return number[lax.min(place(i)[0], G - 1)]  # a block may have no tile at all

        def rows_of_steps(g):
            """Of step k: where its rows are copied from, and which of them are its own."""
            start_, end_, begin_ = start[g], end[g], begin[g]

            def rows(k):
                nominal = begin_ + k * c.tile_k
                first = lax.min(nominal, last_begin(M, c.tile_k))
                low, high = lax.max(start_, nominal), lax.min(end_, nominal + c.tile_k)
                return first, low - first, high - first

            return rows

        def copies(i):
            g, m, n = place(i)
            rows_of = rows_of_steps(g)

            def copy_step(k, slot, barrier):
                rows = pl.ds(pl.multiple_of(rows_of(k)[0], 8), c.tile_k)
                for gmem, smem, at, size in (
                    (x_gmem, a_smem, m, c.tile_m), (dy_gmem, b_smem, n, c.tile_n)
                ):  # fmt: skip
                    columns = pl.ds(at * size, size)
                    plgpu.copy_gmem_to_smem(gmem.at[rows, columns], smem.at[slot], barrier)

            return copy_step

        def prepares(i):
            rows_of = rows_of_steps(place(i)[0])

            def prepare(k, slot):
                _, low, high = rows_of(k)

                @pl.when((low > 0) | (high < c.tile_k))
                def _zero():
                    for smem in (a_smem, b_smem):
                        _keep_rows(smem.at[slot], low, high, interpret)
                    plgpu.commit_smem()

            return prepare

        def store(i, sums):
            g, m, n = place(i)
            for row in range(0, c.tile_m, STORED):
                for j, column in enumerate(range(0, c.tile_n, width)):
                    piece = out_smem.at[warpgroup, j % 2]
                    plgpu.wait_smem_to_gmem(min(j, 1), wait_read_only=True)
                    values = sums[row : row + STORED, column : column + width]
                    piece[...] = values.astype(out_gmem.dtype)
                    plgpu.commit_smem()
                    rows = pl.ds(m * c.tile_m + row, STORED)
                    columns = pl.ds(n * c.tile_n + column, width)
                    plgpu.copy_smem_to_gmem(piece, out_gmem.at[g, rows, columns])

        @pl.when(warpgroup == 2)
        def _copy():
            ping_pong.copy(ring, mine, steps_of, copies)

        @pl.when(warpgroup < 2)
        def _multiply():
            ping_pong.multiply(ring, mine, steps_of, (c.tile_m, c.tile_n), store, prepares)
            plgpu.wait_smem_to_gmem(0)

    alike = swizzled(min(c.tile_m, c.tile_n))  # the tensor cores take no two swizzles
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((G, K, N), x.dtype),
        scratch_types=[
            plgpu.SMEM((c.slots, c.tile_k, c.tile_m), x.dtype, transforms=alike),
            plgpu.SMEM((c.slots, c.tile_k, c.tile_n), x.dtype, transforms=alike),
            plgpu.SMEM((2, 2, STORED, width), x.dtype, transforms=swizzled(width)),
            *ping_pong.barriers(c.slots),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(x, dy, steps.start, steps.end, steps.begin, steps.number)


def _keep_rows(ref: Any, low: Any, high: Any, interpret: Any) -> None:
    """Sets rows before `low` and from `high` on to zero, 64 x 64 at a time: registers are few."""
    rows, columns = ref.shape
    for row in range(0, rows, STORED):
        for column in range(0, columns, STORED):
            shape = (STORED, min(STORED, columns - column))
            piece = ref.at[pl.ds(row, STORED), pl.ds(column, shape[1])]
            if interpret:
                at = lax.broadcasted_iota(jnp.int32, shape, 0)
            else:
                at = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
            held = piece[...]
            mine = (at >= low - row) & (at < high - row)
            piece[...] = jnp.where(mine, held, jnp.zeros_like(held))
