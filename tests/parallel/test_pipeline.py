"""Every schedule on emulated stages against one device, in float64, with a model of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel import mesh as M
from parallel.census import census
from parallel.mesh import Axis, ensure_varying
from parallel.pipeline import run
from parallel.pipeline.schedule import NAMES, make
from parallel.pipeline.simulate import simulate
from parallel.pipeline.split import Split
from tests.parallel.emulated import cases, relative

L, V, D, H, ROWS, T = 8, 11, 6, 10, 2, 3  # two rows a microbatch


def first(shared, rows):
    return shared["embed"][rows["inputs"]]


def layer(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def body(weights, x, rows):
    for i in range(weights["up"].shape[0]):
        x = layer(jax.tree.map(lambda leaf, i=i: leaf[i], weights), x)
    return x


def last(shared, x, rows):
    """Tied: the embedding scores as well."""
    logits = jnp.einsum("btd,vd->btv", x, shared["embed"])
    hit = jnp.take_along_axis(logits, rows["targets"][..., None], axis=-1)[..., 0]
    loss = jnp.sum(jax.nn.logsumexp(logits, axis=-1) - hit)
    return loss, {"loss": loss}


MODEL = run.Model(first, body, last)


def example(microbatches, seed=0):
    rng = np.random.default_rng(seed)
    weights = {"up": rng.normal(0, 0.5, (L, D, H)), "down": rng.normal(0, 0.5, (L, H, D))}
    shared = {"embed": rng.normal(0, 1.0, (V, D))}
    rows = {k: rng.integers(0, V, (microbatches, ROWS, T)) for k in ("inputs", "targets")}
    return weights, shared, rows


@functools.cache
def one_device(microbatches):
    weights, shared, rows = example(microbatches)

    def loss(weights, shared):
        one = lambda m: jax.tree.map(lambda leaf: leaf[m], rows)  # noqa: E731
        return sum(
            last(shared, body(weights, first(shared, one(m)), None), one(m))[0]
            for m in range(microbatches)
        )

    with jax.enable_x64():
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, shared)
        return jax.device_get((value, *gradients))


def program(schedule, model=MODEL, reduce=True):
    """(loss, gradients of layers [L, ...], of the embedding) over pp, and its arguments."""
    P_, C = schedule.stages, schedule.chunks
    mesh = M.make({Axis.PP: P_})

    def local(weights, shared, rows):
        weights, shared = ensure_varying((weights, shared), (Axis.PP,))
        sums, of_weights, of_shared = run.gradients(
            schedule, model, jax.tree.map(lambda w: w[:, 0], weights), shared, rows
        )
        if P_ > 1:
            sums = lax.psum(sums, "pp")
            of_shared = lax.psum(of_shared, "pp") if reduce else lax.pmax(of_shared, "pp")
        return sums["loss"], jax.tree.map(lambda w: w[:, None], of_weights), of_shared

    stages = P(None, "pp" if P_ > 1 else None)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(stages, P(), P()), out_specs=(P(), stages, P())
    )

    def whole(weights, shared, rows):
        cut = jax.tree.map(lambda w: w.reshape(C, P_, -1, *w.shape[1:]), weights)
        loss, of_weights, of_shared = mapped(cut, shared, rows)
        return loss, jax.tree.map(lambda w: w.reshape(L, *w.shape[3:]), of_weights), of_shared

    return jax.jit(whole)


def result(schedule, **options):
    with jax.enable_x64():
        return jax.device_get(program(schedule, **options)(*example(schedule.microbatches)))


CASES = {f"{name} of 4 stages": (name, 4, 8) for name in NAMES} | {
    "1f1b, an odd number": ("1f1b", 2, 3),
    "eager-1f1b of 8 stages": ("eager-1f1b", 8, 8),
    "interleaved, two rounds": ("interleaved", 2, 4),
    "zb-h1, fewer than stages": ("zb-h1", 4, 3),
    "zb-h1 of one stage": ("zb-h1", 1, 2),
}
DEFAULT = {f"{name} of 4 stages" for name in NAMES} | {"zb-h1, fewer than stages"}


@pytest.mark.parametrize("case", cases(CASES, DEFAULT))
def test_equals_one_device(case):
    name, stages, microbatches = CASES[case]
    found = result(make(name, stages, microbatches))
    assert relative(found, one_device(microbatches)) < 1e-10


def shifted(shared, x, rows):
    """Scores a microbatch against the targets of the next row."""
    return last(shared, x, {"targets": jnp.roll(rows["targets"], 1, axis=0)})


def skipped_layer(weights, x, rows):
    return body(jax.tree.map(lambda leaf: leaf[:-1], weights), x, rows)


WRONG = {
    "a layer left out": {"model": run.Model(first, skipped_layer, last)},
    "the tied embedding not summed": {"reduce": False},
    "targets of another row": {"model": run.Model(first, body, shifted)},
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_programs_are_rejected(case):
    found = result(make("eager-1f1b", 2, 3), **WRONG[case])
    assert relative(found, one_device(3)) > 1e-3


@pytest.mark.parametrize("table", ["x_in", "g_in", "b_mb"])
def test_wrong_tables_are_rejected(table, monkeypatch):
    """A message stored a tick late, a microbatch that is another's."""
    right = run.tables

    def wrong(schedule):
        plan, slots = right(schedule)
        changed = np.roll(getattr(plan, table), 1, axis=0)
        if table == "b_mb":
            changed = np.where(plan.b_mb >= 0, (plan.b_mb + 1) % schedule.microbatches, -1)
        return plan._replace(**{table: changed}), slots

    monkeypatch.setattr(run, "tables", wrong)
    assert relative(result(make("eager-1f1b", 2, 3)), one_device(3)) > 1e-3


@functools.cache
def compiled(name, stages, microbatches):
    schedule = make(name, stages, microbatches)
    arguments = jax.tree.map(lambda a: a.astype(a.dtype.name.replace("64", "32")),
                             example(microbatches))  # fmt: skip
    return program(schedule).lower(*arguments).compile()


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_the_loop_holds_two_messages(name):
    schedule = make(name, 4, 8)
    found = census(compiled(name, 4, 8))
    inside = [c for c in found if c.depth == 1]
    assert [(c.op, c.executed) for c in inside] == [("collective-permute", len(schedule.table))] * 2
    assert {c.bytes for c in inside} == {ROWS * T * D * 4}
    assert sum(c.executed for c in inside) * 4 == simulate(schedule).permutes


def test_memory_does_not_grow_with_microbatches():
    """What 1f1b keeps is its stash, whose size is that of the pipeline; gpipe keeps them all."""
    kept = {
        (name, m): compiled(name, 4, m).memory_analysis().temp_size_in_bytes
        for name, m in [("1f1b", 8), ("1f1b", 16), ("gpipe", 8), ("gpipe", 16)]
    }
    columns = 8 * 2 * len(run.Tables._fields) * 4  # of the tables, for 8 microbatches more
    assert kept["1f1b", 16] - kept["1f1b", 8] <= columns
    assert kept["gpipe", 16] - kept["gpipe", 8] >= 8 * ROWS * T * D * 4


@pytest.mark.parametrize("microbatches", [2, 4, 12])
def test_slots(microbatches):
    P_ = 4
    slots = {name: run.tables(make(name, P_, microbatches))[1] for name in NAMES[:3]}
    assert slots["1f1b"].inputs <= min(P_, microbatches)
    assert slots["eager-1f1b"].inputs <= min(2 * P_ - 1, microbatches)
    assert slots["gpipe"].inputs == microbatches
    assert run.tables(make("zb-h1", P_, microbatches))[1].operands <= min(P_, microbatches)


def test_a_parted_backward_pass_costs_what_the_whole_one_costs():
    weights, shared, rows = example(1)
    row = jax.tree.map(lambda leaf: leaf[0], rows)
    to32 = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)  # noqa: E731
    w, x = to32(weights), first(to32(shared), row)
    split = Split.of(body, w, x, row)
    y, residuals = split.forward(w, x, row)
    dx, kept = split.backward(residuals, y)

    def flops(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    whole = flops(lambda w, x, dy: jax.vjp(lambda w, x: body(w, x, row), w, x)[1](dy), w, x, y)
    parts = [
        flops(lambda w, x: body(w, x, row), w, x),
        flops(lambda r, dy: split.backward(r, dy)[0], residuals, y),
        flops(split.weights, kept),
    ]
    assert sum(parts) == pytest.approx(whole, rel=0.1)
    theirs, dx_whole = jax.vjp(lambda w, x: body(w, x, row), w, x)[1](y)
    assert relative((split.weights(kept), dx), (theirs, dx_whole)) == 0
