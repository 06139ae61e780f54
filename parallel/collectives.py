"""Collectives by neighbours' messages alone: what NCCL and XLA do inside, in a few lines each.

All run inside `jax.shard_map` over one mesh axis of n devices, send only by `lax.ppermute`, and are
differentiable: the transpose of a message is the message back, so the gradient of a reduce-scatter
comes out as an all-gather and the other way round.

Bytes that a device sends, for a whole array of b bytes; no algorithm reduces or gathers with fewer
(Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"), and `cost` counts ours:

    reduce-scatter, all-gather, all-to-all    (n-1)/n b    in n-1 steps
    all-reduce                               2(n-1)/n b    in 2(n-1) steps
    broadcast, in n parts                   (2n-2)/n b     in 2n-2 steps

Two directions send two halves the two ways round at once: half the time on links that carry both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxinfra.errors import UserError
from parallel.mesh import ensure_varying


@dataclasses.dataclass(frozen=True)
class Cost:
    """Messages that a device sends one after the other, and their bytes in all."""

    steps: int
    bytes: int


def cost(collective: str, n: int, array_bytes: int) -> Cost:
    """What `collective` over n devices costs, for a whole array of `array_bytes`."""
    part = array_bytes // n
    known = {
        "reduce_scatter": Cost(n - 1, (n - 1) * part),
        "all_gather": Cost(n - 1, (n - 1) * part),
        "all_to_all": Cost(n - 1, (n - 1) * part),
        "all_reduce": Cost(2 * (n - 1), 2 * (n - 1) * part),
        "broadcast": Cost(2 * n - 2, (2 * n - 2) * part),
    }
    return known[collective]


def _shift(x: Array, axis: str, by: int) -> Array:
    """What the device `by` places before this one holds."""
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + by) % n) for i in range(n)])


def _parts(x: Array, axis: str) -> Array:
    n = jax.lax.axis_size(axis)
    if x.shape[0] % n:
        raise UserError(
            f"collectives: {x.shape[0]} rows are no multiple of the {n} devices of {axis}; pad them"
        )
    return ensure_varying(x, (axis,)).reshape(n, x.shape[0] // n, *x.shape[1:])


def reduce_scatter(
    x: Shaped[Array, "n_m ..."], axis: str, *, direction: int = 1
) -> Shaped[Array, "m ..."]:
    """The sum over devices of x [n m, ...], of which device i keeps part i.

    A part starts one place after its home, goes round once and takes each device's share with it.
    """
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    parts = _parts(x, axis)
    total = parts[(i - direction) % n]
    for step in range(2, n + 1):
        total = _shift(total, axis, direction) + parts[(i - direction * step) % n]
    return total


def all_gather(
    x: Shaped[Array, "m ..."], axis: str, *, direction: int = 1
) -> Shaped[Array, "n_m ..."]:
    """Every device's x [m, ...] one after the other, on every device."""
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    x = ensure_varying(x, (axis,))
    out = ensure_varying(jnp.zeros((n, *x.shape), x.dtype), jax.typeof(x).manual_axis_type.varying)
    for step in range(n):
        out = out.at[(i - direction * step) % n].set(x)
        if step < n - 1:
            x = _shift(x, axis, direction)
    return out.reshape(n * x.shape[0], *x.shape[1:])


def all_reduce(
    x: Shaped[Array, "n_m ..."], axis: str, *, direction: int = 1
) -> Shaped[Array, "n_m ..."]:
    """The sum over devices of x [n m, ...]: a reduce-scatter, then an all-gather."""
    return all_gather(reduce_scatter(x, axis, direction=direction), axis, direction=direction)


def both_ways(collective: Callable[..., Array], x: Array, axis: str) -> Array:
    """`collective` of the two halves of x's last dimension, one each way round the ring."""
    if x.shape[-1] % 2:
        raise UserError(f"collectives: a last dimension of {x.shape[-1]} has no two halves; pad it")
    halves = jnp.split(x, 2, axis=-1)
    sent = [
        collective(half, axis, direction=way) for half, way in zip(halves, (1, -1), strict=True)
    ]
    return jnp.concatenate(sent, axis=-1)


def broadcast(x: Shaped[Array, "n_m ..."], axis: str, root: int = 0) -> Shaped[Array, "n_m ..."]:
    """Device `root`'s x [n m, ...] on every device, handed on part by part.

    All parts are under way at once, so the time is that of the array and not n times that.
    """
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    parts = _parts(x, axis)
    place = (i - root) % n  # how far down the chain
    along = [((root + k) % n, (root + k + 1) % n) for k in range(n - 1)]
    for step in range(2 * n - 2):
        mine = jnp.clip(step - place, 0, n - 1)  # the part that leaves here now, if any
        got = jax.lax.ppermute(parts[mine], axis, along)
        coming = step - place + 1
        here = (place > 0) & (coming >= 0) & (coming < n)
        at = jnp.clip(coming, 0, n - 1)
        parts = parts.at[at].set(jnp.where(here, got, parts[at]))
    return parts.reshape(x.shape)


def all_to_all(x: Shaped[Array, "n_m ..."], axis: str) -> Shaped[Array, "n_m ..."]:
    """Part j of device i's x [n m, ...] becomes part i of device j's: a transpose of parts."""
    n, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    parts = _parts(x, axis)
    out = parts  # part i stays
    for step in range(1, n):
        out = out.at[(i - step) % n].set(_shift(parts[(i + step) % n], axis, step))
    return out.reshape(x.shape)
