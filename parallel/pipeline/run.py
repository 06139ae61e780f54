"""Any schedule as one program inside `shard_map`, its backward pass by hand.

A scan over ticks: each stage stores what came, computes its forward, backward and weight-gradient
tasks of the tick where the table has them, and sends. The loop holds two messages, activations to
the next stage and their gradients to the one before. Nothing differentiates through the loop, so
what is kept is what the table asks for: the inputs of microbatches under way, in as many slots as
the longest row of them needs, whatever their number in all.

A backward computes its forward again from the input kept (full rematerialisation): a microbatch
costs F + (F + B), less the forward of the last stage, which its backward has in any case. With
schedules that split, what weight gradients need is kept from the backward to their task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from parallel.mesh import Axis, ensure_varying, index, size
from parallel.pipeline.schedule import B, F, Schedule, W
from parallel.pipeline.split import Split
from parallel.pipeline.validate import validate

Tree = Any
PP = Axis.PP.value


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in three parts; each takes the arrays of one microbatch as well.

    All parameters and results are typed as varying over pp (`mesh.ensure_varying`).
    """

    first: Callable[[Tree, Tree], Array]  # (shared, rows) -> input of the first layer
    body: Callable[[Tree, Array, Tree], Array]  # (weights of one chunk, x, rows) -> x
    last: Callable[[Tree, Array, Tree], tuple[Array, Tree]]  # (shared, x, rows) -> (loss, sums)


class Tables(NamedTuple):
    """A schedule as integers [ticks, P], -1 where there is nothing to do; or a part of that."""

    f_mb: Any
    f_chunk: Any
    f_slot: Any  # where the forward's input lies
    b_mb: Any
    b_chunk: Any
    b_slot: Any
    g_slot: Any  # where the backward's incoming gradient lies
    w_chunk: Any
    w_slot: Any  # where a weight gradient's operands lie: written by B, read by W
    x_in: Any  # where to store what came from the stage before
    g_in: Any  # and from the stage after


@dataclasses.dataclass(frozen=True)
class Slots:
    """How many microbatches' arrays a stage has room for."""

    inputs: int
    gradients: int
    operands: int  # of weight gradients, where the schedule splits


def tables(schedule: Schedule) -> tuple[Tables, Slots]:
    """The integers that the program reads: who computes what, and in which slot it lies.

    A slot is held from the tick in which a message is there to the last tick that reads it.
    """
    validate(schedule)
    P, V, ticks = schedule.stages, schedule.stages * schedule.chunks, len(schedule.table)
    t = Tables(*(np.full((ticks, P), -1, np.int32) for _ in Tables._fields))
    at = {
        (task.kind, task.microbatch, task.chunk * P + s): tick
        for tick, row in enumerate(schedule.table)
        for s, cell in enumerate(row)
        for task in cell
    }
    for (kind, m, v), tick in at.items():
        mb, chunk = {F: (t.f_mb, t.f_chunk), B: (t.b_mb, t.b_chunk), W: (None, t.w_chunk)}[kind]
        chunk[tick, v % P] = v // P
        if mb is not None:
            mb[tick, v % P] = m
    counts = []
    for s in range(P):
        own = [(m, v) for m in range(schedule.microbatches) for v in range(s, V, P)]
        inputs = {(m, v): (at[F, m, v - 1] + 1, at[B, m, v]) for m, v in own if v}
        gradients = {(m, v): (at[B, m, v + 1] + 1, at[B, m, v]) for m, v in own if v + 1 < V}
        operands = {(m, v): (at[B, m, v], at[W, m, v]) for m, v in own if schedule.splits}
        x_slots, g_slots, w_slots = _slots(inputs), _slots(gradients), _slots(operands)
        for (m, v), slot in x_slots.items():
            t.x_in[inputs[m, v][0], s] = t.f_slot[at[F, m, v], s] = slot
            t.b_slot[at[B, m, v], s] = slot
        for (m, v), slot in g_slots.items():
            t.g_in[gradients[m, v][0], s] = t.g_slot[at[B, m, v], s] = slot
        for (m, v), slot in w_slots.items():
            t.w_slot[at[B, m, v], s] = slot
            t.w_slot[at[W, m, v], s] = slot
        counts.append(
            [max(slots.values(), default=-1) + 1 for slots in (x_slots, g_slots, w_slots)]
        )
    return t, Slots(*(int(n) for n in np.max(counts, axis=0)))


def _slots(lives: dict[Any, tuple[int, int]]) -> dict[Any, int]:
    """A slot for each life [first tick, last tick]; no two that overlap share one."""
    free_from: list[int] = []
    slots = {}
    for key, (first, last) in sorted(lives.items(), key=lambda item: item[1]):
        slot = next((i for i, free in enumerate(free_from) if free <= first), len(free_from))
        free_from[slot : slot + 1] = [last + 1]
        slots[key] = slot
    return slots


def gradients(
    schedule: Schedule, model: Model, weights: Tree, shared: Tree, rows: Tree
) -> tuple[Tree, Tree, Tree]:
    """(sums, gradients of `weights`, of `shared`) of all microbatches, inside `shard_map` over pp.

    Args:
      weights: this stage's parameters [C, ...], chunk c of them for virtual stage c P + stage.
      shared: parameters that `first` and `last` read; the same on every stage.
      rows: arrays [M, ...], a microbatch each.

    Gradients are float32 (or wider) sums over microbatches and are not summed over any axis: those
    of `shared` are zero where a stage neither embeds nor scores, and need their sum over pp. `sums`
    adds up what `model.last` gives beside the loss, on the last stage.
    """
    P, stage = schedule.stages, index(PP)
    plan, slots = tables(schedule)
    rows = ensure_varying(rows, (PP,))  # each stage is at another microbatch
    columns = Tables(*(jnp.asarray(table)[:, stage] for table in plan))
    one = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731

    # Traced for shapes and types alone; nothing of it is computed.
    x0 = model.first(shared, one(rows, 0))
    split = Split.of(model.body, one(weights, 0), x0, one(rows, 0)) if schedule.splits else None
    operands = split.operands if split else ()
    sums0 = _zeros(model.last(shared, x0, one(rows, 0))[1])
    carry = {
        "inputs": _buffer(x0, slots.inputs),
        "gradients": _buffer(x0, slots.gradients),
        "operands": [_buffer(operand, slots.operands) for operand in operands],
        "from_before": jnp.zeros_like(x0),
        "from_after": jnp.zeros_like(x0),
        "weights": _sums(weights),
        "shared": _sums(shared),
        "sums": sums0,
    }

    def tick(carry: dict[str, Any], t: Tables) -> tuple[dict[str, Any], None]:
        inputs = _store(carry["inputs"], t.x_in, carry["from_before"])
        arrived = _store(carry["gradients"], t.g_in, carry["from_after"])

        def x_of(microbatch: Array, chunk: Array, slot: Array) -> Array:
            begins = (stage == 0) & (chunk == 0)
            return lax.cond(
                begins,
                lambda: model.first(shared, one(rows, microbatch)),
                lambda: _load(inputs, slot, x0),
            )

        def forward() -> Array:
            x = x_of(t.f_mb, t.f_chunk, t.f_slot)
            return model.body(one(weights, t.f_chunk), x, one(rows, t.f_mb))

        ends = (stage == P - 1) & (t.f_chunk == schedule.chunks - 1)
        y = lax.cond((t.f_mb >= 0) & ~ends, forward, lambda: jnp.zeros_like(x0))

        def backward(state: tuple) -> tuple:
            sums, stash, of_weights, of_shared = state
            row, mine = one(rows, t.b_mb), one(weights, t.b_chunk)
            x = x_of(t.b_mb, t.b_chunk, t.b_slot)
            if split:
                y, residuals = split.forward(mine, x, row)
            else:
                y, transpose = jax.vjp(lambda w, x: model.body(w, x, row), mine, x)

            def score(state: tuple) -> tuple:
                sums, of_shared = state
                loss_of = lambda s, y: model.last(s, y, row)  # noqa: E731
                (d_shared, dy), more = jax.grad(loss_of, (0, 1), has_aux=True)(shared, y)
                return jax.tree.map(jnp.add, sums, more), _add(of_shared, d_shared), dy

            last = (stage == P - 1) & (t.b_chunk == schedule.chunks - 1)
            sums, of_shared, dy = lax.cond(
                last, score, lambda state: (*state, _load(arrived, t.g_slot, x0)), (sums, of_shared)
            )
            if split:
                dx, kept = split.backward(residuals, dy)
                stash = [_store(s, t.w_slot, k) for s, k in zip(stash, kept, strict=True)]
            else:
                d_weights, dx = transpose(dy)
                of_weights = _add_at(of_weights, t.b_chunk, d_weights)

            def embed(of_shared: Tree) -> Tree:
                _, transpose = jax.vjp(lambda s: model.first(s, row), shared)
                return _add(of_shared, transpose(dx)[0])

            begins = (stage == 0) & (t.b_chunk == 0)
            of_shared = lax.cond(begins, embed, lambda of_shared: of_shared, of_shared)
            return sums, stash, of_weights, of_shared, dx

        state = (carry["sums"], carry["operands"], carry["weights"], carry["shared"])
        sums, stash, of_weights, of_shared, dx = lax.cond(
            t.b_mb >= 0, backward, lambda state: (*state, jnp.zeros_like(x0)), state
        )
        if split:
            later = split.weights
            of_weights = lax.cond(
                t.w_chunk >= 0,
                lambda g: _add_at(g, t.w_chunk, later([s[t.w_slot] for s in stash])),
                lambda g: g,
                of_weights,
            )
        return {
            "inputs": inputs, "gradients": arrived, "operands": stash,
            "from_before": _sent(y, schedule, 1), "from_after": _sent(dx, schedule, -1),
            "weights": of_weights, "shared": of_shared, "sums": sums,
        }, None  # fmt: skip

    carry, _ = lax.scan(tick, carry, columns)
    return carry["sums"], carry["weights"], carry["shared"]


def _sent(x: Array, schedule: Schedule, by: int) -> Array:
    """x at the neighbour; from the last stage to the first only where there are more chunks."""
    n = size(PP)
    if n == 1:
        return x if schedule.chunks > 1 else jnp.zeros_like(x)
    pairs: Iterable[tuple[int, int]] = ((i, i + by) for i in range(n))
    if schedule.chunks > 1:
        return lax.ppermute(x, PP, [(i, j % n) for i, j in pairs])
    return lax.ppermute(x, PP, [(i, j) for i, j in pairs if 0 <= j < n])


def _buffer(x: Array, slots: int) -> Array:
    return jnp.stack([jnp.zeros_like(x)] * max(slots, 1))


def _store(buffer: Array, slot: Array, x: Array) -> Array:
    """The buffer with x in its slot; unchanged where the slot is -1."""
    at = jnp.maximum(slot, 0)
    return buffer.at[at].set(jnp.where(slot >= 0, x, buffer[at]))


def _load(buffer: Array, slot: Array, like: Array) -> Array:
    return buffer[jnp.maximum(slot, 0)].astype(like.dtype)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def _sums(tree: Tree) -> Tree:
    """Zeros to add gradients to, at least float32."""
    wide = lambda leaf: jnp.float32 if leaf.dtype.itemsize < 4 else leaf.dtype  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf).astype(wide(leaf)), tree)


def _add(sums: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, more)


def _add_at(sums: Tree, chunk: Array, more: Tree) -> Tree:
    return jax.tree.map(lambda s, g: s.at[chunk].add(g.astype(s.dtype)), sums, more)
