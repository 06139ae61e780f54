"""Matrix multiplication on Hopper: one persistent kernel for both schedules, any edge, any layout.

A block on every multiprocessor makes one tile of the output after the other. One warpgroup copies
pieces of a and b into a ring of slots that outlives the tiles; two multiply, each with one product
under way while the next is queued, and hand a slot back when the product that read it has ended.
Cooperative, the two share a tile and its slots; in ping-pong each has tiles of its own, and one
multiplies while the other stores. The blocks of a cluster make tiles one below the other and fetch
their common columns of b once, for all.

The copy engine reads zeros beyond the edges of a and b and writes nothing beyond those of the
output, so no size need be a multiple of a tile's. It moves pieces of 8 rows of 64 elements, and its
view of an array has whole ones: `matmul` pads an array that has not.

Cost: 2 M N K FLOPs; a is read N / tile_n times and b M / (tile_m cluster) times, from the L2 cache
where bands of `band` tiles keep them there.
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
from pallas_kernels.matmul.epilogue import activate
from pallas_kernels.matmul.tiles import swizzled
from pallas_kernels.mma import reads_end, sums

PIECE = 64  # rows and columns of what an epilogue stores at a time
SHARED_MEMORY = 232_448  # bytes that a block may have


@dataclasses.dataclass(frozen=True)
class Config:
    """A schedule: `tile_m` x `tile_n` sums a block (in ping-pong: a warpgroup), `tile_k` a slot."""

    tile_m: int = 128
    tile_n: int = 256
    tile_k: int = 64
    slots: int = 4
    band: int = 8  # tiles across
    cluster: int = 1  # blocks that share what they copy of b; of a where they stand `beside`
    beside: bool = False
    ping_pong: bool = False

    @property
    def shared_memory(self) -> int:
        """Bytes of a block's slots and pieces, for 16-bit floats."""
        slot = (self.tile_m + self.tile_n) * self.tile_k
        return 2 * (self.slots * slot + 4 * PIECE * min(PIECE, self.tile_n))


def activated(pieces: list[Array], activation: str | None) -> Array:
    """The activation of a piece, or of gate and up."""
    if activation == "swiglu":
        gate, up = pieces
        return jax.nn.silu(gate) * up
    return activate(pieces[0], activation)


def matmul(
    a: Float[Array, "A M K"],
    b: Float[Array, "B K N"],
    scale: Float[Array, "C 1"] | None = None,
    bias: Float[Array, "D N"] | None = None,
    residual: Float[Array, "E M n"] | None = None,
    *,
    config: Config,
    activation: str | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    interpret: Any = False,
) -> Float[Array, "batch M n"]:
    """The product of `pallas_kernels.matmul` with its epilogue, for 16-bit floats.

    Every operand has a batch axis of one common length, or of 1, which stands for all. Memory rows
    of a and b are multiples of 64 elements, their other axes and M multiples of 8 (`matmul` pads),
    and n, the columns that `activation` leaves of N, is one of 64. scale and bias are float32.
    """
    c = config
    M, K = a.shape[:0:-1] if transpose_a else a.shape[1:]
    N = b.shape[1] if transpose_b else b.shape[2]
    operands = [x for x in (a, b, scale, bias, residual) if x is not None]
    batch = max(x.shape[0] for x in operands)
    glu = 2 if activation == "swiglu" else 1
    down, across = (1, c.cluster) if c.beside else (c.cluster, 1)
    tiles = (-(-M // (c.tile_m * down)), -(-N // (c.tile_n * across)))
    per_batch, steps = tiles[0] * tiles[1], -(-K // c.tile_k)
    clusters = max(1, _compat.multiprocessors(interpret) // c.cluster)
    rows_of_one = c.tile_m if c.ping_pong else c.tile_m // 2
    multicast = ("cluster",) if c.cluster > 1 else None

    if bias is not None:  # the last tile reads beyond N
        beyond = tiles[1] * across * c.tile_n - N
        operands[2 + (scale is not None)] = jnp.pad(bias, ((0, 0), (0, beyond)))

    def kernel(*refs):
        *inputs, out_gmem, a_smem, b_smem, pieces, arrived, free, turn, fetched = refs
        a_gmem, b_gmem = inputs[:2]
        extra = iter(inputs[2:])
        scale_gmem, bias_gmem, residual_gmem = (
            None if x is None else next(extra) for x in (scale, bias, residual)
        )

        def of_batch(ref, z):
            return ref.at[z if ref.shape[0] > 1 else 0]

        warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("clusters")

        def place(i):
            """Batch, first row and number across of this block's tile number i."""
            tile = cluster + i * clusters
            m, n = plgpu.planar_snake(lax.rem(tile, per_batch), tiles, 1, c.band)
            if c.cluster > 1:
                member = lax.axis_index("cluster")
                m, n = (m, n * across + member) if c.beside else (m * down + member, n)
            return lax.div(tile, per_batch), m * c.tile_m, n

        def place_in_ring(done):
            """The slot of the block's step number `done`, and the number of its barriers.

            Who waits for a barrier must wait for all its phases: in ping-pong, where a slot serves
            either warpgroup, it has a pair of barriers for each.
            """
            slot = lax.rem(done, c.slots)
            owner = lax.rem(lax.div(done, steps), 2) if c.ping_pong else 0
            return slot, slot + owner * c.slots

        mine = lax.div(batch * per_batch - cluster + clusters - 1, clusters)  # tiles of this block

        def store(acc, z, first_row, n, warpgroup):
            """The epilogue of sums, piece by piece; returns with copies out still under way.

            A piece of the residual arrives where the result that takes its place leaves from.
            """
            mine, width = pieces.at[warpgroup], min(PIECE, acc.shape[1])
            places = [
                (row, column)
                for row in range(0, acc.shape[0], PIECE)
                for column in range(0, acc.shape[1] // glu, width)
            ]
            out = out_gmem.at[z]

            def part(ref, i):
                row, column = places[i]
                first = n * (c.tile_n // glu)
                return ref.at[pl.ds(first_row + row, PIECE), pl.ds(first + column, width)]

            def fetch(i):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                source, barrier = of_batch(residual_gmem, z), fetched.at[2 * warpgroup + i % 2]
                plgpu.copy_gmem_to_smem(part(source, i), mine.at[i % 2], barrier)

            def finished(row, column):
                """Sums of one piece, scaled and with their bias."""
                values = acc[row : row + PIECE, column : column + width]
                if scale is not None:
                    values = values * of_batch(scale_gmem, z)[0]
                if bias is not None:
                    span = pl.ds(n * c.tile_n + column, width)
                    row_of_bias = _compat.load_plainly(of_batch(bias_gmem, z).at[span], interpret)
                    values += lax.broadcast_in_dim(row_of_bias, values.shape, (1,))
                return values

            if residual is not None:
                fetch(0)
            for i, (row, column) in enumerate(places):
                firsts = [glu * column + j * width for j in range(glu)]
                values = activated([finished(row, first) for first in firsts], activation)
                if residual is None:
                    # A tile of one piece finds the last one's in its place.
                    plgpu.wait_smem_to_gmem(min(1, len(places) - 1), wait_read_only=True)
                else:
                    if i + 1 < len(places):
                        fetch(i + 1)
                    plgpu.barrier_wait(fetched.at[2 * warpgroup + i % 2])
                    values += mine[i % 2].astype(jnp.float32)
                mine[i % 2] = values.astype(mine.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(mine.at[i % 2], part(out, i))

        @pl.when(warpgroup == 2)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _(i):
                z, m, n = place(i)
                a_tile, b_tile = of_batch(a_gmem, z), of_batch(b_gmem, z)

                @pl.loop(0, steps)
                def _(k):
                    slot, barrier = place_in_ring(i * steps + k)

                    @pl.when(i * steps + k >= c.slots)
                    def _():
                        plgpu.barrier_wait(free.at[place_in_ring(i * steps + k - c.slots)[1]])

                    rows, columns = pl.ds(m, c.tile_m), pl.ds(n * c.tile_n, c.tile_n)
                    ks = pl.ds(k * c.tile_k, c.tile_k)
                    plgpu.copy_gmem_to_smem(
                        a_tile.at[ks, rows] if transpose_a else a_tile.at[rows, ks],
                        a_smem.at[slot], arrived.at[barrier],
                        collective_axes=multicast if c.beside else None,
                    )  # fmt: skip
                    plgpu.copy_gmem_to_smem(
                        b_tile.at[columns, ks] if transpose_b else b_tile.at[ks, columns],
                        b_smem.at[slot], arrived.at[barrier],
                        collective_axes=None if c.beside else multicast,
                    )  # fmt: skip

            # The last releases are waited for too: this warpgroup may not leave before the others.
            @pl.loop(lax.max(0, mine * steps - c.slots), mine * steps)
            def _(done):
                plgpu.barrier_wait(free.at[place_in_ring(done)[1]])

        @pl.when(warpgroup < 2)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            first, stride = (warpgroup, 2) if c.ping_pong else (0, 1)
            my_rows = 0 if c.ping_pong else warpgroup * rows_of_one

            def views(slot):
                mine = pl.ds(my_rows, rows_of_one)
                left = a_smem.at[slot, :, mine].T if transpose_a else a_smem.at[slot, mine]
                return left, b_smem.at[slot].T if transpose_b else b_smem.at[slot]

            def multiply(acc, done):
                slot, barrier = place_in_ring(done)
                plgpu.barrier_wait(arrived.at[barrier])
                plgpu.wgmma(acc, *views(slot))

            def release(done):
                slot, barrier = place_in_ring(done)
                reads_end(a_smem.at[slot], b_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(free.at[barrier])

            @pl.loop(0, lax.div(mine - first + stride - 1, stride))
            def _(j):
                i = first + j * stride
                z, m, n = place(i)
                if c.ping_pong:

                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_wait(turn.at[warpgroup])

                def hold(acc):
                    multiply(acc, i * steps)

                    @pl.loop(1, steps)
                    def _(k):
                        multiply(acc, i * steps + k)
                        plgpu.wgmma_wait(1)
                        release(i * steps + k - 1)

                    if c.ping_pong:

                        @pl.when(i + 1 < mine)
                        def _():
                            plgpu.barrier_arrive(turn.at[1 - warpgroup])

                    plgpu.wgmma_wait(0)
                    release((i + 1) * steps - 1)
                    return sums(acc)

                acc = pl.run_scoped(hold, _compat.Accumulator((rows_of_one, c.tile_n), jnp.float32))
                store(acc, z, m + my_rows, n, warpgroup)

            plgpu.wait_smem_to_gmem(0)

    barriers = (2 if c.ping_pong else 1) * c.slots
    releases = 1 if c.ping_pong else 2
    if c.cluster > 1:
        free_type = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=releases, num_barriers=barriers
        )
    else:
        free_type = plgpu.Barrier(num_arrivals=releases, num_barriers=barriers)
    a_slot = (c.tile_k, c.tile_m) if transpose_a else (c.tile_m, c.tile_k)
    b_slot = (c.tile_n, c.tile_k) if transpose_b else (c.tile_k, c.tile_n)
    alike = swizzled(min(a_slot[1], b_slot[1]))  # the tensor cores take no two swizzles

    def slots(shape):
        return plgpu.SMEM((c.slots, *shape), a.dtype, transforms=alike)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, M, N // glu), a.dtype),
        scratch_types=[
            slots(a_slot),
            slots(b_slot),
            plgpu.SMEM((2, 2, PIECE, min(PIECE, c.tile_n)), a.dtype, transforms=swizzled(c.tile_n)),
            plgpu.Barrier(num_arrivals=2, num_barriers=barriers),
            free_type,
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
            plgpu.Barrier(num_arrivals=1, num_barriers=4),
        ],
        grid=(clusters,),
        grid_names=("clusters",),
        **({"cluster": (c.cluster,), "cluster_names": ("cluster",)} if c.cluster > 1 else {}),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(),
        interpret=interpret,
    )(*operands)
