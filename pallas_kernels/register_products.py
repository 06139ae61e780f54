"""Tensor-core products that go on while the warpgroup does, with a left side in registers too.

No interpreter takes a left side in registers. Interpreted, a sum is therefore a Python object whose
value a product adds to at once, read from the same references; where a product ends on the chip,
`mma.reads_end` shows the race detector that it read its operands until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _compat


class _Value:
    """An interpreted sum."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.value = jnp.zeros(shape, jnp.float32)


def with_sums(run: Callable[..., Any], *shapes: tuple[int, int], interpret: Any) -> Any:
    """`run` of sums that begin at zero; a sum takes a warpgroup m n / 128 registers a thread."""
    if interpret:
        return run(*map(_Value, shapes))
    return pl.run_scoped(run, *(_compat.Accumulator(shape, jnp.float32) for shape in shapes))


def begin(
    total: Any, a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False
) -> None:
    """Begins total += a @ b: a [m, k] is a reference or a value, b [k, n] one in shared memory.

    With `transpose_a`, a is [k, m], a reference; with `transpose_b`, b is [n, k].
    """
    if not isinstance(total, _Value):
        plgpu.wgmma(total, a.T if transpose_a else a, b.T if transpose_b else b)
        return
    left, right = (x[...].astype(jnp.float32) for x in (a, b))
    total.value += jnp.dot(left.T if transpose_a else left, right.T if transpose_b else right)
    plgpu.commit_smem()  # the next copy into an operand is ordered by a barrier


def read(total: Any, under_way: int = 0) -> Float[Array, "m n"]:
    """The sum, when no more than the last `under_way` products of the warpgroup still go on.

    The barrier keeps arithmetic on the sum behind the wait, to which nothing else ties it.
    """
    if isinstance(total, _Value):
        return total.value
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(total, wait_n=under_way))


def write(total: Any, value: Float[Array, "m n"]) -> None:
    """Makes the sum `value`; no product into it may go on."""
    if isinstance(total, _Value):
        total.value = value
    else:
        total[...] = value


def loop(
    low: Any, high: Any, body: Callable[..., Any], sums: Sequence[Any], *carry: Any
) -> tuple[Any, ...]:
    """`carry` after `body(i, *carry)`, or None for none, of each i in [low, high).

    The body adds to `sums`; products go on from one turn to the next.
    """
    interpreted = [x for x in sums if isinstance(x, _Value)]

    def turn(i, state):
        values, carry = state
        for total, value in zip(interpreted, values, strict=True):
            total.value = value
        carry = body(i, *carry) or ()
        return [x.value for x in interpreted], carry

    values, carry = lax.fori_loop(low, high, turn, ([x.value for x in interpreted], carry))
    for total, value in zip(interpreted, values, strict=True):
        total.value = value
    return carry
