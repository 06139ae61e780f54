"""A linear layer's softmax on Hopper without its logits: two kernels and XLA's plain products.

`statistics` makes tiles of logits and keeps, in registers, what `blocks.merge` needs: of each row
and each part of the vocabulary the largest logit, two sums and the target's logit. `derivatives`
makes the tiles of one block of the vocabulary again and stores dz, 16 bits each, from which XLA
makes dx and dw. Logits are powers of two inside: one multiply-add and one power an element.

Cost: 2 M D V FLOPs forward, 6 M D V backward. In memory: [4, parts, M] float32 forward; backward
dz [M, block], dx in float32 and a copy of a block of w and of dw, 4 D bytes a column.

Predicted for M = 8,192, D = 2,048, V = 151,936, on an H200 with 740 TFLOP/s in the kernels, 760 in
XLA's products and 4 TB/s: forward 5.1 TFLOP, 6.9 ms; backward 15.3 TFLOP, 20.3 ms, and 1 ms for
sums of dx and copies; 224 MB. XLA by the same blocks stores its logits in float32 and reads them
twice: 10.9 ms forward, 25 backward. So 1.6 times as fast forward, 1.25 in both passes, whose two
products with dz are XLA's either way. Why no other way:
- Logits kept (16 bits): 2 M D V FLOPs fewer, 6.9 ms, and 2.5 GB more. In blocks of rows, as
  `chunked` has them, dw is summed up in 1.2 GB of float32, which each block reads and writes.
- dz not stored at all, but multiplied on in the kernel: a tile of dz gives to all of its rows of
  dx; added up in global memory that is D / tile_n times the bytes of dz, 19 GB a pass of 192.
- A block of rows instead of one of the vocabulary: the same dz, but dw's sums instead of dx's,
  V / M times as many.
So even a cross-entropy, whose weights are known before, takes the two passes here: 8 M D V FLOPs
against `chunked`'s 6, for a tenth of its memory.

Seen there (`python -m jaxinfra.kernels.loss_bench`): forward 6.3 ms at 811 TFLOP/s, 1.64 times XLA
by rows, in 9 MB beside its 1,287; both passes 32.5 ms, 1.12 times, in 261 MB beside 2,498. What is
missed is XLA's: its products with dz. The cross-entropy takes 31.4 ms in both passes where
`chunked` takes 28.0, so that one is not chosen. With D = 1,024: 2.22, 1.28 and 1.02 times.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import _compat
from pallas_kernels.cross_entropy.blocks import LOWEST, Rule, Slopes
from pallas_kernels.cross_entropy.mosaic_gpu_tiles import (
    PIECE,
    Config,
    Unit,
    columns,
    each_tile,
    of_rows,
    pieces,
    plan,
    scratch,
)
from pallas_kernels.matmul.tiles import SWIZZLED

LOG2E = math.log2(math.e)
FORWARD, BACKWARD = Config(slots=5, band=32), Config(tile_n=128, slots=6)  # the best of nine


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The kernels' tiles, and columns of dz alive at a time.

    With the defaults, 8,192 rows give both kernels whole waves of 132 blocks.
    """

    forward: Config = FORWARD
    backward: Config = BACKWARD
    block: int = 6336


DEFAULT = Schedule()


def refusal(*, platform: str, dtype: Any, D: int, V: int, transpose_w: bool) -> str | None:
    """Why the kernels cannot take this call, or None if they can."""
    if reason := _compat.not_hopper(platform):
        return reason
    return misfit(dtype, D, V, transpose_w)


def misfit(dtype: Any, D: int, V: int, transpose_w: bool) -> str | None:
    """What of the operands the copy engine or the tensor cores do not take."""
    if dtype != jnp.bfloat16:
        return f"the kernels take bfloat16, not {jnp.dtype(dtype).name}"
    if D % PIECE:
        return f"the kernels take a D that is a multiple of {PIECE}, not {D}"
    least = 8 if transpose_w else PIECE
    return f"the kernels take a V that is a multiple of {least}, not {V}" if V % least else None


def statistics(
    rule: Rule,
    c: Config,
    x: Float[Array, "M D"],
    w: Array,
    targets: Int[Array, " M"],
    *,
    interpret: Any = False,
) -> Float[Array, "4 S M"]:
    """Of S parts of the vocabulary what `blocks.statistics` tells of one."""
    M, V = x.shape[0], rule.words(w)
    p = plan(c, M, x.shape[1], V, _compat.multiprocessors(interpret), together=True)
    padded, tellers = p.down * c.tile_m, p.splits * (2 if c.ping_pong else 1)

    def kernel(x_gmem, w_gmem, targets_gmem, out_gmem, told, *ring):
        warpgroup = lax.axis_index("warpgroup")
        starts = range(0, c.rows, PIECE)

        def begin(unit: Unit) -> Any:
            firsts = (LOWEST, 0.0, 0.0, 0.0)
            one = [of_rows(jnp.full((PIECE,), value, jnp.float32), interpret) for value in firsts]
            return tuple(tuple(one) for _ in starts)

        def use(products: Array, unit: Unit, column: Any, carry: Any) -> Any:
            of_part: dict[int, list] = {row: [] for row in starts}
            for row, at, values in pieces(products):
                of_part[row].append((column + at, _powers(rule, values)[0]))
            return tuple(
                told_of(unit.row + row, of_part[row], numbers)
                for row, numbers in zip(starts, carry, strict=True)
            )

        def told_of(row: Any, parts: list, numbers: Any) -> Any:
            """The numbers of 64 rows after more of their logits, given in powers of two."""
            top, total, drift, hit = numbers
            place, shape = columns(interpret), (PIECE, PIECE)
            mine = targets_gmem.at[pl.ds(row, PIECE)]
            target = _compat.load_plainly(mine, interpret)
            seen, largest = [], top
            for at, y in parts:
                y = jnp.where(place < V - at, y, LOWEST)
                found = place == lax.broadcast_in_dim(target - at, shape, (0,))
                hit = hit + jnp.sum(jnp.where(found, y, 0.0), axis=1)
                largest = jnp.maximum(largest, jnp.max(y, axis=1))
                seen.append(y)
            shrink = jnp.exp2(top - largest)
            drift = (drift + total * (top - largest)) * shrink
            total = total * shrink
            for y in seen:
                below = y - lax.broadcast_in_dim(largest, shape, (0,))
                e = jnp.exp2(below)
                total = total + jnp.sum(e, axis=1)
                drift = drift + jnp.sum(e * below, axis=1)
            return largest, total, drift, hit

        def end(unit: Unit, carry: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for row, numbers in zip(starts, carry, strict=True):
                for i, number in enumerate(numbers):
                    told[warpgroup, i, pl.ds(row, PIECE)] = number
            plgpu.commit_smem()
            for i in range(4):
                there = out_gmem.at[i, unit.teller, pl.ds(unit.row, c.rows)]
                plgpu.copy_smem_to_gmem(told.at[warpgroup, i], there)

        each_tile(
            c, p, x_gmem, w_gmem, ring, transpose_w=rule.transpose_w,
            begin=begin, use=use, end=end, interpret=interpret,
        )  # fmt: skip

    out = _launch(
        kernel, c, p.blocks, rule, x.dtype,
        # A copy of one row that goes past its end would go on into the next row.
        jax.ShapeDtypeStruct((4, tellers, padded), jnp.float32),
        plgpu.SMEM((2, 4, c.rows), jnp.float32), interpret,
    )(_whole(x), w, _up_to(targets, padded, -1))  # fmt: skip
    tops, totals, drifts, hits = out[:, :, :M]
    return jnp.stack([tops / LOG2E, totals, drifts / LOG2E, hits / LOG2E])


def derivatives(
    rule: Rule,
    c: Config,
    x: Float[Array, "M D"],
    w: Array,
    targets: Int[Array, " M"],
    slopes: Slopes,
    *,
    interpret: Any = False,
) -> Float[Array, "M v"]:
    """dz of one block of w, in x's dtype, as `blocks.derivatives`."""
    M, v = x.shape[0], rule.words(w)
    whole, stored = _whole(x), -(-v // PIECE) * PIECE
    p = plan(c, M, x.shape[1], v, _compat.multiprocessors(interpret), together=False)
    padded = p.down * c.tile_m

    def kernel(x_gmem, w_gmem, targets_gmem, rows_gmem, out_gmem, leaving, *ring):
        mine = leaving.at[lax.axis_index("warpgroup")]
        shape = (PIECE, PIECE)

        def use(products: Array, unit: Unit, column: Any, carry: Any) -> Any:
            place = columns(interpret)
            for i, (row, at, values) in enumerate(pieces(products)):
                if at == 0:
                    rows = pl.ds(unit.row + row, PIECE)
                    target = _compat.load_plainly(targets_gmem.at[rows], interpret)
                    hit, a, b, lse = (
                        _compat.load_plainly(rows_gmem.at[n, rows], interpret) for n in range(4)
                    )
                y, slope = _powers(rule, values)
                logp = y - lax.broadcast_in_dim(lse, shape, (0,))
                factor = lax.broadcast_in_dim(b, shape, (0,)) * logp
                dz = jnp.exp2(logp) * (factor + lax.broadcast_in_dim(a, shape, (0,)))
                found = place == lax.broadcast_in_dim(target - (column + at), shape, (0,))
                dz = dz + jnp.where(found, lax.broadcast_in_dim(hit, shape, (0,)), 0.0)
                if slope is not None:
                    dz = dz * slope
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                mine[i % 2] = dz.astype(x.dtype)
                plgpu.commit_smem()
                there = out_gmem.at[pl.ds(unit.row + row, PIECE), pl.ds(column + at, PIECE)]
                plgpu.copy_smem_to_gmem(mine.at[i % 2], there)
            return carry

        each_tile(
            c, p, x_gmem, w_gmem, ring, transpose_w=rule.transpose_w,
            begin=lambda unit: (), use=use, end=lambda unit, carry: None, interpret=interpret,
        )  # fmt: skip

    unit = 1 / rule.temperature
    of_row = jnp.stack(
        [slopes.hit * unit, slopes.a * unit, slopes.b * (unit / LOG2E), slopes.lse * LOG2E]
    )
    words = _up_to(targets, padded, -1)
    out = _launch(
        kernel, c, p.blocks, rule, x.dtype,
        jax.ShapeDtypeStruct((whole.shape[0], stored), x.dtype),
        plgpu.SMEM((2, 2, PIECE, PIECE), x.dtype, transforms=SWIZZLED), interpret,
    )(whole, w, words, _up_to(of_row, padded, 0.0))  # fmt: skip
    return out[:M, :v]


def _launch(
    kernel: Any, c: Config, blocks: int, rule: Rule, dtype: Any, out_type: Any, leaving: Any,
    interpret: Any,
) -> Any:  # fmt: skip
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[leaving, *scratch(c, dtype, rule.transpose_w)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=_compat.compiler_params(approx_math=True),
        interpret=interpret,
    )


def _powers(rule: Rule, z: Array) -> tuple[Array, Array | None]:
    """The logits in powers of two, and with a cap their slope in z times the temperature."""
    unit = LOG2E / rule.temperature
    if rule.soft_cap is None:
        return z * unit, None
    # tanh(x) = 1 - 2 / (1 + e^2x); the chip's own tanh has eleven bits.
    t = 1 - 2 / (1 + jnp.exp2(z * (2 * LOG2E / rule.soft_cap)))
    return t * (rule.soft_cap * unit), 1 - t * t


def _whole(x: Array) -> Array:
    """x with whole pieces of 8 rows, which the copy engine moves."""
    return jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))


def _up_to(rows: Array, size: int, value: Any) -> Array:
    """Numbers a row for whole tiles of rows."""
    beyond = [(0, 0)] * (rows.ndim - 1) + [(0, size - rows.shape[-1])]
    return jnp.pad(rows, beyond, constant_values=value)
