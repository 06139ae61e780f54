"""Tiles of logits on Hopper, one after the other, and what is done with each while in registers.

The two kernels of `mosaic_gpu` differ in what they make of a tile. Common to them is how it comes
about: a block on every multiprocessor, one warpgroup that copies pieces of x and w into a ring of
slots, two that multiply. They share a tile, or in ping-pong have tiles in turns, and then one has
the tensor cores while the other goes through its logits. The ring outlives the tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import _compat
from pallas_kernels.matmul.tiles import SWIZZLED
from pallas_kernels.mma import reads_end, sums

PIECE = 64  # rows and columns of a tile that are gone through at a time
TILE_K = 64
SHARED_MEMORY = 232_448  # bytes that a block may have


@dataclasses.dataclass(frozen=True)
class Config:
    """`tile_m` x `tile_n` logits a block (in ping-pong: a warpgroup), `slots` of the ring.

    `band`: tiles of rows that go through the vocabulary side by side.
    """

    tile_m: int = 128
    tile_n: int = 192
    slots: int = 4
    band: int = 16
    ping_pong: bool = True

    def shared_memory(self, *, stores: bool) -> int:
        """Bytes of a block's slots, and of what leaves it: pieces of dz, or four numbers a row."""
        ring = 2 * self.slots * (self.tile_m + self.tile_n) * TILE_K
        return ring + (4 * 2 * PIECE * PIECE if stores else 2 * 4 * 4 * self.rows)

    @property
    def rows(self) -> int:
        """Rows of a warpgroup."""
        return self.tile_m if self.ping_pong else self.tile_m // 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """`down` tiles of rows times `splits` of the columns make the units, each of `tiles` tiles."""

    down: int
    splits: int
    tiles: int
    steps: int  # along D
    blocks: int

    @property
    def spent(self) -> int:
        """Tiles of the block that has most."""
        return -(-self.down * self.splits // self.blocks) * self.tiles


def plan(c: Config, M: int, D: int, V: int, blocks: int, *, together: bool) -> Plan:
    """The units that `blocks` multiprocessors end soonest with; of equal ones the longest.

    Tiles are `together` in units of which each warpgroup has one at least; or a unit is a tile.
    """
    down, tiles, steps = -(-M // c.tile_m), -(-V // c.tile_n), -(-D // TILE_K)
    if not together:
        return Plan(down, tiles, 1, steps, blocks)
    least = 2 if c.ping_pong else 1
    plans = []
    for splits in range(1, min(tiles, 4 * blocks) + 1):
        each = max(least, -(-tiles // splits))
        plans.append(Plan(down, -(-tiles // each), each, steps, blocks))
    return min(plans, key=lambda p: (p.spent, p.splits))


@dataclasses.dataclass(frozen=True)
class Unit:
    """Where a unit's logits lie: the warpgroup's first row, which split, its number among those
    that tell of the same rows."""

    row: Any
    split: Any
    teller: Any


def scratch(c: Config, dtype: Any, transpose_w: bool) -> list[Any]:
    """The ring, and its barriers: arrived, free, and whose turn it is."""
    rings = 2 if c.ping_pong else 1  # who waits for a barrier must wait for all its phases
    w_slot = (c.tile_n, TILE_K) if transpose_w else (TILE_K, c.tile_n)
    return [
        plgpu.SMEM((c.slots, c.tile_m, TILE_K), dtype, transforms=SWIZZLED),
        plgpu.SMEM((c.slots, *w_slot), dtype, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=2, num_barriers=rings * c.slots),
        plgpu.Barrier(num_arrivals=3 - rings, num_barriers=rings * c.slots),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
    ]


def each_tile(
    c: Config,
    p: Plan,
    x_gmem: Any,
    w_gmem: Any,
    ring: Any,
    *,
    transpose_w: bool,
    begin: Callable[[Unit], Any],
    use: Callable[[Any, Unit, Any, Any], Any],
    end: Callable[[Unit, Any], None],
    interpret: Any,
) -> None:
    """Runs a kernel's warpgroups: `begin` and `end` of each unit, `use` of each tile between.

    Products are [rows of a warpgroup, tile_n] in float32, from `column` on; `use` returns the
    unit's next carry.
    """
    x_smem, w_smem, arrived, free, turn = ring
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    units = lax.div(jnp.int32(p.down * p.splits) - block + (p.blocks - 1), jnp.int32(p.blocks))
    mine = units * p.tiles  # tiles of this block

    def place(u: Any) -> tuple[Any, Any]:
        """The tile of rows and the split of this block's unit number u."""
        return plgpu.planar_snake(block + u * p.blocks, (p.down, p.splits), 0, c.band)

    def place_in_ring(done: Any) -> tuple[Any, Any]:
        """The slot of the block's step number `done`, and the number of its barriers."""
        slot = lax.rem(done, c.slots)
        owner = lax.rem(lax.div(done, p.steps), 2) if c.ping_pong else 0
        return slot, slot + owner * c.slots

    @pl.when(warpgroup == 2)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, mine)
        def _(i):
            m, split = place(lax.div(i, p.tiles))
            n = split * p.tiles + lax.rem(i, p.tiles)
            rows, columns = pl.ds(m * c.tile_m, c.tile_m), pl.ds(n * c.tile_n, c.tile_n)

            @pl.loop(0, p.steps)
            def _(k):
                done = i * p.steps + k
                slot, barrier = place_in_ring(done)

                @pl.when(done >= c.slots)
                def _():
                    plgpu.barrier_wait(free.at[place_in_ring(done - c.slots)[1]])

                ks = pl.ds(k * TILE_K, TILE_K)
                here = arrived.at[barrier]
                plgpu.copy_gmem_to_smem(x_gmem.at[rows, ks], x_smem.at[slot], here)
                w_part = w_gmem.at[columns, ks] if transpose_w else w_gmem.at[ks, columns]
                plgpu.copy_gmem_to_smem(w_part, w_smem.at[slot], here)

        # The last releases are waited for too: this warpgroup may not leave before the others.
        @pl.loop(lax.max(0, mine * p.steps - c.slots), mine * p.steps)
        def _(done):
            plgpu.barrier_wait(free.at[place_in_ring(done)[1]])

    @pl.when(warpgroup < 2)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        stride = 2 if c.ping_pong else 1
        my_rows = 0 if c.ping_pong else warpgroup * c.rows

        def multiply(acc: Any, done: Any) -> None:
            slot, barrier = place_in_ring(done)
            plgpu.barrier_wait(arrived.at[barrier])
            w_view = w_smem.at[slot].T if transpose_w else w_smem.at[slot]
            plgpu.wgmma(acc, x_smem.at[slot, pl.ds(my_rows, c.rows)], w_view)

        def release(done: Any) -> None:
            slot, barrier = place_in_ring(done)
            reads_end(x_smem.at[slot], w_smem.at[slot], interpret=interpret)
            plgpu.barrier_arrive(free.at[barrier])

        def products(i: Any) -> Array:
            """Those of the block's tile number i."""
            if c.ping_pong:

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_wait(turn.at[warpgroup])

            def hold(acc):
                multiply(acc, i * p.steps)

                @pl.loop(1, p.steps)
                def _(k):
                    multiply(acc, i * p.steps + k)
                    plgpu.wgmma_wait(1)
                    release(i * p.steps + k - 1)

                if c.ping_pong:

                    @pl.when(i + 1 < mine)
                    def _():
                        plgpu.barrier_arrive(turn.at[1 - warpgroup])

                plgpu.wgmma_wait(0)
                release((i + 1) * p.steps - 1)
                return sums(acc)

            return pl.run_scoped(hold, _compat.Accumulator((c.rows, c.tile_n), jnp.float32))

        @pl.loop(0, units)
        def _(u):
            m, split = place(u)
            teller = split * 2 + warpgroup if c.ping_pong else split
            unit = Unit(m * c.tile_m + my_rows, split, teller)
            # In ping-pong the block's tiles of even numbers are the first warpgroup's.
            lead = lax.rem(warpgroup + u * p.tiles, 2) if c.ping_pong else 0

            def turn_of(j, carry):
                i = lead + j * stride
                column = (split * p.tiles + i) * c.tile_n
                return use(products(u * p.tiles + i), unit, column, carry)

            count = lax.div(p.tiles - lead + stride - 1, stride)
            end(unit, lax.fori_loop(0, count, turn_of, begin(unit)))

        plgpu.wait_smem_to_gmem(0)


def pieces(values: Array) -> list[tuple[int, int, Array]]:
    """The 64 x 64 pieces of a warpgroup's values, with their first row and column in it."""
    return [
        (row, column, values[row : row + PIECE, column : column + PIECE])
        for row in range(0, values.shape[0], PIECE)
        for column in range(0, values.shape[1], PIECE)
    ]


def columns(interpret: Any) -> jax.Array:
    """The number of each element's column in a piece, as the tensor cores hold it."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, (PIECE, PIECE), 1)
    return plgpu.broadcasted_iota(jnp.int32, (PIECE, PIECE), 1, layout=plgpu.Layout.WGMMA)


def of_rows(row: Array, interpret: Any) -> jax.Array:
    """A number a row of a piece, laid out beside what the tensor cores hold: a loop's first."""
    return row if interpret else plgpu.layout_cast(row, plgpu.Layout.WGMMA.reduce(1))
