"""Two warpgroups that multiply in turns and one that copies for both: the frame of the kernels.

A block makes one tile after the other. A tile is one warpgroup's: while it stores, the other
multiplies. One ring of slots serves both, and a tile may take any number of steps, none too. Who
waits for a barrier must wait for all its phases, so each slot has a barrier for each reader.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.mma import reads_end, sums

STORED = 64  # rows and columns of what is stored at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """`tile_m` x `tile_n` sums a warpgroup, `tile_k` a slot, `band` tiles across at a time."""

    tile_m: int = 128
    tile_n: int = 192
    tile_k: int = 64
    slots: int = 4
    band: int = 8

    @property
    def shared_memory(self) -> int:
        """Bytes of a block's slots and of what its warpgroups store, for 16-bit floats."""
        slot = (self.tile_m + self.tile_n) * self.tile_k
        return 2 * (self.slots * slot + 2 * 3 * STORED * STORED)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of a and b in shared memory, [slots, ...], and their barriers."""

    a: Any
    b: Any
    arrived: Any
    free: Any
    turn: Any
    _: dataclasses.KW_ONLY
    transpose_a: bool = False
    transpose_b: bool = False
    interpret: Any

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.a.shape[0]

    def views(self, slot: Any) -> tuple[Any, Any]:
        """a [m, k] and b [k, n] of a slot, as the tensor cores take them."""
        a, b = self.a.at[slot], self.b.at[slot]
        return a.T if self.transpose_a else a, b.T if self.transpose_b else b

    def release(self, done: Any) -> None:
        """Hands the slot of step number `done` back."""
        slot = lax.rem(done, self.slots)
        reads_end(self.a.at[slot], self.b.at[slot], interpret=self.interpret)
        plgpu.barrier_arrive(self.free.at[slot])


def barriers(slots: int) -> list[Any]:
    """Types of `Ring`'s arrived, free and turn."""
    return [
        plgpu.Barrier(num_arrivals=2, num_barriers=2 * slots),
        plgpu.Barrier(num_arrivals=1, num_barriers=slots),
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
    ]


def copy(ring: Ring, tiles: Any, steps: Callable, copies: Callable) -> None:
    """The work of the warpgroup that copies.

    `steps(i)` is how many steps the block's tile number i takes; `copies(i)` is the function of
    (k, slot, barrier) that begins the two copies of its step k.
    """
    plgpu.set_max_registers(40, action="decrease")

    def of_tile(i, begun):
        owner, copy_step = lax.rem(i, 2), copies(i)

        def of_step(k, done):
            slot = lax.rem(done, ring.slots)

            @pl.when(done >= ring.slots)
            def _():
                plgpu.barrier_wait(ring.free.at[slot])

            copy_step(k, slot, ring.arrived.at[slot + owner * ring.slots])
            return done + 1

        return lax.fori_loop(0, steps(i), of_step, begun)

    done = lax.fori_loop(0, tiles, of_tile, jnp.int32(0))

    # The last releases are waited for too: this warpgroup may not leave before the others.
    @pl.loop(lax.max(0, done - ring.slots), done)
    def _(step):
        plgpu.barrier_wait(ring.free.at[lax.rem(step, ring.slots)])


def multiply(
    ring: Ring,
    tiles: Any,
    steps: Callable,
    shape: tuple[int, int],
    store: Callable,
    prepares: Callable | None = None,
) -> None:
    """The work of warpgroup 0 or 1: sums of every second tile of the block.

    `prepares(i)` is a function of (k, slot) that may change what has arrived of a step; `store(i,
    sums)` takes float32 of `shape`.
    """
    plgpu.set_max_registers(232, action="increase")
    warpgroup = lax.axis_index("warpgroup")

    def steps_of_both(i):
        return steps(i) + steps(lax.min(i + 1, tiles - 1))

    def of_tile(j, begun):
        i = warpgroup + 2 * j
        number = steps(i)
        prepare = prepares(i) if prepares else None

        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(ring.turn.at[warpgroup])

        def arrive(k):
            slot = lax.rem(begun + k, ring.slots)
            plgpu.barrier_wait(ring.arrived.at[slot + warpgroup * ring.slots])
            if prepare is not None:
                prepare(k, slot)
            return slot

        def release_before(k):
            @pl.when(k > 0)
            def _():
                ring.release(begun + k - 1)

        def all_begun():
            @pl.when(i + 1 < tiles)
            def _():
                plgpu.barrier_arrive(ring.turn.at[1 - warpgroup])

        store(i, _sums(ring, number, shape, arrive, release_before, all_begun))
        return begun + steps_of_both(i)

    first = jnp.where(warpgroup == 0, 0, steps(0))
    lax.fori_loop(0, lax.div(tiles - warpgroup + 1, 2), of_tile, first)


def _sums(
    ring: Ring,
    number: Any,
    shape: tuple[int, int],
    arrive: Callable,
    release_before: Callable,
    all_begun: Callable,
) -> Any:
    """The sum of `number` products, one under way while the next begins."""
    if ring.interpret:  # jax 0.10 interprets no transposed reference, so products are of values

        def step(k, values):
            slot = arrive(k)
            a, b = (ref[slot].astype(jnp.float32) for ref in (ring.a, ring.b))
            values += jnp.dot(a.T if ring.transpose_a else a, b.T if ring.transpose_b else b)
            release_before(k)
            return values

        values = lax.fori_loop(0, number, step, jnp.zeros(shape, jnp.float32))
        all_begun()
        release_before(number)
        return values

    def hold(acc):
        @pl.loop(0, number)
        def _(k):
            plgpu.wgmma(acc, *ring.views(arrive(k)))
            plgpu.wgmma_wait(1)
            release_before(k)

        all_begun()
        plgpu.wgmma_wait(0)
        release_before(number)
        return sums(acc)

    return pl.run_scoped(hold, _compat.Accumulator(shape, jnp.float32))
