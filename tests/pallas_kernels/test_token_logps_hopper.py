"""The Hopper kernels of a head's softmax: interpreted with the race detector, and lowered."""

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy, token_logps
from pallas_kernels.cross_entropy import mosaic_gpu, mosaic_gpu_tiles, reference, statistics
from pallas_kernels.cross_entropy.blocks import Rule
from pallas_kernels.cross_entropy.mosaic_gpu import Schedule
from pallas_kernels.cross_entropy.mosaic_gpu_tiles import SHARED_MEMORY, Config, plan
from pallas_kernels.interpreter import WHOLE, RaceError, interpret

newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")
slow = pytest.mark.slow
SMALL = Config(64, 64, slots=2)
EDGED = Config(64, 128, slots=2)
TOGETHER = Config(128, 128, slots=2, ping_pong=False)
TALL = Config(128, 128, slots=3)


def draw(M, D, V):
    """x, w, targets at edges and elsewhere, cotangents of the log-probabilities and entropies."""
    rng = np.random.default_rng(M + V)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((M, D), (D, V)))
    targets = rng.integers(0, V, M)
    targets[:5] = 0, V - 1, 63, min(64, V - 1), V // 2
    return x, w * jnp.bfloat16(0.3), jnp.asarray(targets, jnp.int32), *rng.normal(size=(2, M))


def pulled(fn, drawn, transpose_w=False, **options):
    """`fn`'s two results, and what makes gradients of cotangents."""
    x, w, targets = drawn[:3]
    if transpose_w:
        w, options = w.T, options | {"transpose_w": True}
    return jax.vjp(lambda x, w: fn(x, w, targets, **options), x, w)


def gradients(pull, drawn, transpose_w=False, **_options):
    """Those of x and w [D, V]."""
    dx, dw = pull(tuple(jnp.asarray(of, jnp.float32) for of in drawn[3:]))
    return dx, dw.T if transpose_w else dw


def held(drawn, config, block=128, **options):
    """The interpreted kernels' results are the reference's of the same numbers in float32."""
    x, w, targets, *cotangents = drawn
    exact = x.astype(jnp.float32), w.astype(jnp.float32), targets, *cotangents
    plain = {k: v for k, v in options.items() if k != "transpose_w"}
    out, pull = pulled(reference.token_logps, exact, **plain)
    wanted = *out, *gradients(pull, exact)
    schedule = Schedule(config, dataclasses.replace(config, slots=2), block)

    # Apart, for of two kernels only the second's races are told.
    asked: Any = options | {"schedule": schedule}
    out, pull = interpret(
        lambda interpret: pulled(token_logps, drawn, interpret=interpret, **asked)
    )
    found = *out, *interpret(lambda interpret: gradients(pull, drawn, **asked))
    for name, got, want in zip(("logp", "entropy", "dx", "dw"), found, wanted, strict=True):
        bound = 1e-4 if name in ("logp", "entropy") else 2**-7 * float(jnp.abs(want).max())
        got = got.astype(jnp.float32)
        np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=name)


CASES = {  # M, D, V; the config; the options
    "a block of the vocabulary that no tile fits": ((64, 64, 320), SMALL, {"block": 192}),
    "every option, the embedding's layout": (
        (120, 128, 328), TALL,
        {"soft_cap": 3.0, "temperature": 0.7, "transpose_w": True, "block": 256},
    ),
    "more rows than a tile, more steps than slots": ((72, 256, 192), SMALL, {}),
    "one tile for two warpgroups": ((64, 64, 64), SMALL, {}),
    "rows that no tile fits": ((133, 64, 192), TOGETHER, {"temperature": 1.3}),
    "soft cap": ((64, 64, 128), SMALL, {"soft_cap": 4.0}),
    "tall": ((256, 128, 384), TALL, {}),
    "together": ((128, 128, 256), TOGETHER, {}),
}  # fmt: skip
FAST = ("soft cap", *(["one tile for two warpgroups", "together"] if WHOLE else []))
# jax 0.10 interprets neither a copy that crosses an edge nor a transposed reference.
PLAIN = ("soft cap", "tall", "together")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=([] if n in FAST else [slow]) + ([] if n in PLAIN else [newer]))
        for n in CASES
    ],
)
def test_the_kernels_give_the_references_values_and_gradients_and_do_not_race(name):
    shape, config, options = CASES[name]
    held(draw(*shape), config, **options)


@slow
def test_a_cross_entropy_and_its_gradient():
    x, w, targets, weights, _ = draw(64, 64, 128)
    weights = jnp.asarray(weights, jnp.float32)

    def run(fn, x, w, **options):
        total = lambda x, w: fn(x, w, targets, weights, z_loss=0.1, soft_cap=5.0, **options)  # noqa: E731
        (loss, nll), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, w)
        return loss, nll, *gradients

    def kernels(interpret):
        schedule = Schedule(SMALL, SMALL, 64)
        return run(linear_cross_entropy, x, w, schedule=schedule, interpret=interpret)

    exact = (a.astype(jnp.float32) for a in (x, w))
    for got, want in zip(
        interpret(kernels), run(reference.linear_cross_entropy, *exact), strict=True
    ):
        bound = 2**-7 * float(jnp.abs(want).max())
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0, atol=bound)


MISTAKES = {  # the module, what is replaced in its source by what, what it raises
    "a slot handed back while it is read": (
        mosaic_gpu_tiles,
        [
            ("plgpu.barrier_arrive(free.at[barrier])", "pass"),
            ("plgpu.barrier_wait(arrived.at[barrier])",
             "plgpu.barrier_wait(arrived.at[barrier]); plgpu.barrier_arrive(free.at[barrier])"),
        ],
        RaceError,
    ),
    "columns beyond the vocabulary count": (
        mosaic_gpu, [("jnp.where(place < V - at, y, LOWEST)", "y")], AssertionError,
    ),
    "logits before their factors arrive": (
        mosaic_gpu_tiles, [("plgpu.barrier_wait(arrived.at[barrier])", "pass")], RaceError,
    ),
    "numbers that leave before they are all there": (
        mosaic_gpu,
        [("= number\n            plgpu.commit_smem()", "= number")],
        RaceError,
    ),
    "sums that forget a larger logit": (
        mosaic_gpu, [("total = total * shrink", "pass")], AssertionError,
    ),
    "the target one column off": (
        mosaic_gpu,
        [("lax.broadcast_in_dim(target - at,", "lax.broadcast_in_dim(target - at + 1,")],
        AssertionError,
    ),
    "the weight of the entropy's slope in bits": (
        mosaic_gpu, [("slopes.b * (unit / LOG2E)", "slopes.b * unit")], AssertionError,
    ),
}  # fmt: skip


def with_mistake(monkeypatch, module, replacements):
    """A module made from its source with replacements, in its place."""
    source = Path(module.__file__).read_text()
    for right, wrong in replacements:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    mistaken = types.ModuleType("mistaken")
    monkeypatch.setitem(sys.modules, mistaken.__name__, mistaken)
    exec(source, mistaken.__dict__)
    if module is mosaic_gpu:
        monkeypatch.setattr(statistics, "mosaic_gpu", mistaken)
    else:
        monkeypatch.setattr(mosaic_gpu, "each_tile", mistaken.each_tile)


@newer
@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_every_mistake_is_found(monkeypatch, name):
    module, replacements, raised = MISTAKES[name]
    with_mistake(monkeypatch, module, replacements)
    with pytest.raises(raised):
        held(draw(256, 128, 448), EDGED, block=256)


@newer
def test_nothing_planted_passes(monkeypatch):
    same = ("total = total * shrink", "total = shrink * total")
    with_mistake(monkeypatch, mosaic_gpu, [same])
    held(draw(256, 128, 448), EDGED, block=256)


@pytest.mark.parametrize("M", [1, 64, 333, 8192])
@pytest.mark.parametrize("V", [64, 49_152, 151_936])
@pytest.mark.parametrize("config", [Schedule().forward, TOGETHER])
def test_a_plan_has_every_tile_once_and_fills_the_chip(M, V, config):
    p = plan(config, M, 64, V, 132, together=True)
    tiles = -(-V // config.tile_n)
    assert p.splits * p.tiles >= tiles > (p.splits - 1) * p.tiles
    assert p.tiles >= (2 if config.ping_pong else 1)  # each warpgroup has something to tell
    assert p.spent <= max(2, 1.1 * p.down * tiles / 132 + 2)
    if (M, V) == (8192, 151_936) and config.ping_pong:
        assert p.spent * 132 == p.down * tiles  # the schedule's claim


SHAPES = {"D=1024": (8192, 1024, 151_936), "few rows": (3, 2048, 32_000), "V=264": (100, 64, 264)}


@pytest.mark.parametrize(
    ("name", "soft_cap"),
    [
        ("few rows", 30.0),
        ("V=264", None),
        pytest.param("few rows", None, marks=slow),
        pytest.param("D=1024", None, marks=slow),
    ],
)
@pytest.mark.parametrize("transpose_w", [False, True])
def test_the_kernels_lower_for_the_chip(name, transpose_w, soft_cap):
    M, D, V = SHAPES[name]
    V = V if transpose_w else V // 64 * 64
    call = statistics.Call("mosaic_gpu", Rule(0.7, soft_cap, transpose_w))
    shape = jax.ShapeDtypeStruct

    def gradients(x, w, targets, rows):
        out, pull = jax.vjp(lambda x, w: statistics.statistics(call, x, w, targets), x, w)
        return out, pull(rows)

    w = shape((V, D) if transpose_w else (D, V), jnp.bfloat16)
    rows = (shape((M,), jnp.float32),) * 3
    arrays = shape((M, D), jnp.bfloat16), w, shape((M,), jnp.int32), rows
    text = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    whole, rest = divmod(V, call.schedule.block)
    assert text.count("custom_call @mosaic_gpu") == 1 + (whole > 0) + (rest > 0)
    assert whole == 0 or f"{M}x{V}" not in text
    assert whole == 0 or f"{-(-M // 8) * 8}x{call.schedule.block}xbf16" in text


@pytest.mark.parametrize("config", [Schedule().forward, Schedule().backward])
def test_a_schedule_fits_into_shared_memory(config):
    stores = config is Schedule().backward
    assert config.shared_memory(stores=stores) <= SHARED_MEMORY - 1024  # barriers need some
    assert Config(slots=6).shared_memory(stores=False) > SHARED_MEMORY  # the check can fail
