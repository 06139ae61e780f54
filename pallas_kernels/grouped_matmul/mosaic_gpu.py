"""The grouped product on Hopper: a persistent kernel whose tiles are found from the counts.

`schedule.row_tiles` makes a table of tiles of rows, each of one group, and every block walks its
share of (tile of rows, tile of columns), as `ping_pong` does. Groups begin at any row. A tile that
is all its group's leaves shared memory in pieces of 64 x 64. Of one at an edge of its group 32, 16,
... 1 rows are copied out, as many as are the group's, from a piece that lies row by row. Rows
behind the last group are set to zero without a product.

Cost: 2 M K N FLOPs and those of rows that fill tiles up, about 4 + tile_m / 2 a group; w is read
once for each of a group's tiles of rows and x once for each tile of columns, from the L2 cache
where bands keep them there.

One H200, bfloat16 (`python -m jaxinfra.kernels.grouped_bench`): 128 groups of 65,536 rows, 2,048 x
768, 640 TFLOP/s forward and 606 for the rows' gradient, where XLA's ragged_dot reaches 6; 8 groups
of 16,384 rows, 4,096 x 14,336, 768 and 731, where ragged_dot reaches 100 and a product a group 698
and 714. No derivative.
"""

from __future__ import annotations

import functools
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
from pallas_kernels.grouped_matmul.schedule import in_bands, row_tiles
from pallas_kernels.matmul.tiles import swizzled

_POWERS = tuple(2**i for i in range(5, -1, -1))  # of rows of a piece, which has 64


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    counts: Int[Array, " G"],
    *,
    config: Config,
    transpose_w: bool = False,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """`reference.grouped_matmul` of 16-bit floats; with `transpose_w`, w is [G, N, K].

    M is a multiple of 8, K and N are of 64 (`pallas_kernels.grouped_matmul` pads).
    """
    c = config
    (M, K), N = x.shape, w.shape[1 if transpose_w else 2]
    table = row_tiles(counts, M, c.tile_m)
    across, steps = -(-N // c.tile_n), -(-K // c.tile_k)
    blocks = _compat.multiprocessors(interpret)
    width = min(STORED, c.tile_n)

    def kernel(
        x_gmem, w_gmem, group, first, low, high, some, out_gmem,
        a_smem, b_smem, whole_smem, edge_smem, *barriers,
    ):  # fmt: skip
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        ring = ping_pong.Ring(
            a_smem, b_smem, *barriers, transpose_b=transpose_w, interpret=interpret
        )
        total = some[0] * across
        mine = lax.div(total - block + blocks - 1, blocks)

        def place(i):
            return in_bands(block + i * blocks, some[0], across, c.band)

        def copies(i):
            t, n = place(i)
            rows = pl.ds(pl.multiple_of(first[t], 8), c.tile_m)
            columns, matrix = pl.ds(n * c.tile_n, c.tile_n), group[t]

            def copy_step(k, slot, barrier):
                ks = pl.ds(k * c.tile_k, c.tile_k)
                plgpu.copy_gmem_to_smem(x_gmem.at[rows, ks], a_smem.at[slot], barrier)
                part = (columns, ks) if transpose_w else (ks, columns)
                plgpu.copy_gmem_to_smem(w_gmem.at[(matrix, *part)], b_smem.at[slot], barrier)

            return copy_step

        def store(t, n, values):
            """Copies a tile's own rows out; the last copies may still be under way."""
            for row in range(0, c.tile_m, STORED):
                begin, end = (lax.clamp(0, edge[t] - row, STORED) for edge in (low, high))
                of_piece = functools.partial(
                    _store_piece, row=first[t] + row, begin=begin, end=end, out=out_gmem
                )
                for j, column in enumerate(range(0, c.tile_n, width)):
                    of_piece(
                        values(row, column), column=n * c.tile_n + column, first=j == 0,
                        whole_smem=whole_smem.at[warpgroup, j % 2],
                        edge_smem=edge_smem.at[warpgroup],
                    )  # fmt: skip

        @pl.when(warpgroup == 2)
        def _copy():
            ping_pong.copy(ring, mine, lambda i: steps, copies)

        @pl.when(warpgroup < 2)
        def _multiply():
            def store_sums(i, sums):
                store(
                    *place(i), lambda row, column: sums[row : row + STORED, column : column + width]
                )

            ping_pong.multiply(ring, mine, lambda i: steps, (c.tile_m, c.tile_n), store_sums)
            nothing = jnp.zeros((STORED, width), jnp.float32)
            me, all_of_us = 2 * block + warpgroup, 2 * blocks
            behind = (some[1] - some[0]) * across

            @pl.loop(0, lax.div(behind - me + all_of_us - 1, all_of_us))
            def _(i):
                tile = i * all_of_us + me
                store(some[0] + lax.div(tile, across), lax.rem(tile, across), lambda *_: nothing)

            plgpu.wait_smem_to_gmem(0)

    b_slot = (c.tile_n, c.tile_k) if transpose_w else (c.tile_k, c.tile_n)
    alike = swizzled(min(c.tile_k, b_slot[1]))  # the tensor cores take no two swizzles
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), x.dtype),
        scratch_types=[
            plgpu.SMEM((c.slots, c.tile_m, c.tile_k), x.dtype, transforms=alike),
            plgpu.SMEM((c.slots, *b_slot), x.dtype, transforms=alike),
            plgpu.SMEM((2, 2, STORED, width), x.dtype, transforms=swizzled(width)),
            plgpu.SMEM((2, STORED, width), x.dtype),
            *ping_pong.barriers(c.slots),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(x, w, table.group, table.first, table.low, table.high, table.some)


def _store_piece(
    values: Float[Array, "m n"],
    *,
    row: Any,
    column: Any,
    begin: Any,
    end: Any,
    first: bool,
    out: Any,
    whole_smem: Any,
    edge_smem: Any,
) -> None:
    """Copies rows `begin` to `end` of a piece out to where the piece begins at (row, column).

    `first` of a row of pieces: the copy before may be from the same place in shared memory.
    """
    m, n = values.shape

    @pl.when((begin == 0) & (end == m))
    def _whole():
        plgpu.wait_smem_to_gmem(0 if first else 1, wait_read_only=True)
        whole_smem[...] = values.astype(out.dtype)
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(row, 8), m)
        plgpu.copy_smem_to_gmem(whole_smem, out.at[rows, pl.ds(column, n)])

    @pl.when((begin < end) & (end - begin < m))
    def _edge():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        edge_smem[...] = values.astype(out.dtype)
        plgpu.commit_smem()
        at = begin
        for size in _POWERS:

            @pl.when((end - begin) & size != 0)
            def _(at=at, size=size):
                there = out.at[pl.ds(row + at, size), pl.ds(column, n)]
                plgpu.copy_smem_to_gmem(edge_smem.at[pl.ds(at, size)], there)

            at = at + ((end - begin) & size)
