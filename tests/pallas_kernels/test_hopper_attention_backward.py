"""Gradients of Hopper's attention: interpreted with the race detector, held to the reference's."""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import mosaic_gpu_backward as backward
from pallas_kernels.flash_attention import mosaic_gpu_backward_keys as of_keys
from pallas_kernels.flash_attention import mosaic_gpu_backward_queries as of_queries
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.mosaic_gpu_config import (
    FUSED_CONFIGS,
    KEY_CONFIGS,
    QUERY_CONFIGS,
    SHARED_MEMORY,
    KeyConfig,
    QueryConfig,
    Rule,
)
from pallas_kernels.flash_attention.seen_by import SeenBy
from pallas_kernels.interpreter import WHOLE, RaceError, interpret

newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")
slow = pytest.mark.slow
ALONE = (QueryConfig(warpgroups=1, v_slots=1), KeyConfig(warpgroups=1))
SHARED = (QueryConfig(v_slots=1), KeyConfig(share=True))
TOGETHER = (QueryConfig(), KeyConfig())
FUSED = (None, KeyConfig(fused=True))
FACTS = ("causal", "soft_cap", "scale")


def draw(B, T, S, N, K, H, dtype=jnp.bfloat16):
    """q, k, v and the cotangents of the output and of the log-sum-exp."""
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(rng.normal(size=(B, N, T)), jnp.float32)


def segments(B, T, S):
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(np.sort(rng.integers(0, 3, (B, n))), jnp.int32) for n in (T, S))


def extra_of(options, B):
    """What the kernels are told by arrays."""
    extra = {}
    if "q_offset" in options:
        extra["offset"] = jnp.broadcast_to(jnp.asarray(options["q_offset"], jnp.int32), (B,))
    if "window" in options:
        extra["window"] = jnp.asarray(options["window"], jnp.int32).reshape(1)
    if "segment_ids" in options:
        extra["q_segments"], extra["kv_segments"] = options["segment_ids"]
    if "sinks" in options:
        extra["sinks"] = options["sinks"]
    return extra


def rule_of(options, H, S, interpret=False):
    facts = [options.get(name) for name in FACTS]
    return Rule(bool(facts[0]), facts[1], H**-0.5 if facts[2] is None else facts[2], S, interpret)


def held(drawn, gradients=backward.gradients, configs=ALONE, **options):
    """The interpreted kernels' gradients are the reference's."""
    q, k, v, dout, dlse = drawn
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    sinks = options.get("sinks", jnp.full(q.shape[2], -jnp.inf))
    of = lambda q, k, v, sinks: reference.attention(q, k, v, **options | {"sinks": sinks})  # noqa: E731
    (out, lse), pull = jax.vjp(of, *exact, sinks)
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0.0)
    wanted = pull((dout.astype(jnp.float32), dlse))

    def run(*arrays, interpret):
        rule = rule_of(options, q.shape[3], k.shape[1], interpret)
        extra = extra_of(options, q.shape[0])
        run = lambda *arrays: gradients(rule, True, *arrays, extra, configs=configs)  # noqa: E731
        return jax.jit(run)(*arrays) if configs[0] is None else run(*arrays)  # for mutable arrays

    run.__qualname__ = gradients.__qualname__
    found, of_sinks = interpret(run, q, k, v, out, lse, dout, dlse)
    found = [*found, *of_sinks.values()]
    steps = 3 if q.dtype == jnp.bfloat16 else 0.7
    for name, got, want in zip(("dq", "dk", "dv", "dsinks"), found, wanted, strict=False):
        want = np.asarray(want)
        bound = steps * 2**-9 * max(1.0, np.abs(want).max())
        np.testing.assert_allclose(
            np.asarray(got, np.float32), want, rtol=0, atol=bound, err_msg=name
        )


SINKS = jnp.asarray([0.5, -jnp.inf])
CASES = {  # B, T, S, N, K; the configs; the options
    "causal": ((1, 256, 256, 1, 1), TOGETHER, {"causal": True}),
    "fused": ((1, 256, 256, 1, 1), FUSED, {"causal": True}),
    "fused, grouped, nothing to see": (
        (2, 128, 192, 4, 2), FUSED, {"causal": True, "q_offset": jnp.asarray([64, -70])}
    ),
    "fused, window": (
        (1, 192, 256, 1, 1), FUSED, {"window": 70, "causal": True, "q_offset": 60}
    ),
    "full": ((1, 192, 192, 1, 1), ALONE, {}),
    "grouped": ((1, 128, 128, 4, 2), TOGETHER, {"causal": True}),
    "one makes dk, one dv": ((1, 192, 128, 2, 1), SHARED, {"causal": True, "q_offset": -30}),
    "rows that see nothing": (
        (2, 128, 192, 1, 1), ALONE, {"causal": True, "q_offset": jnp.asarray([64, -70])}
    ),
    "scale": ((1, 64, 64, 1, 1), ALONE, {"scale": 0.3}),
    "segments": (
        (2, 128, 128, 1, 1), TOGETHER, {"segment_ids": segments(2, 128, 128), "causal": True}
    ),
    "sinks": ((1, 64, 64, 2, 1), ALONE, {"sinks": SINKS, "causal": True, "q_offset": -10}),
    "soft cap": ((1, 64, 128, 1, 1), ALONE, {"soft_cap": 2.0}),
    "window": ((1, 128, 256, 1, 1), ALONE, {"window": 70, "causal": True, "q_offset": 100}),
    "window, not causal": ((1, 128, 192, 1, 1), ALONE, {"window": jnp.int32(70)}),
}  # fmt: skip
FAST = ("fused", "scale", "sinks")


def marks(name):
    if name not in FAST:
        return slow, newer  # jax 0.10's interpreter is slow, and may wait for ever
    return [newer] if CASES[name][1] is FUSED else []


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in sorted(CASES)])
def test_the_kernels_give_the_references_gradients_and_do_not_race(name):
    shape, configs, options = CASES[name]
    held(draw(*shape, 64), configs=configs, **options)


@newer
@slow
@pytest.mark.parametrize("configs", [SHARED, TOGETHER])
def test_every_option_at_once(configs):
    held(
        draw(2, 128, 192, 2, 1, 64), configs=configs,
        causal=True, window=50, soft_cap=3.0, scale=0.2, sinks=SINKS,
        q_offset=jnp.asarray([70, -40]), segment_ids=segments(2, 128, 192),
    )  # fmt: skip


@newer
@slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("H", [128, 256])
def test_wider_heads(H, fused):
    if fused and H not in FUSED_CONFIGS:
        pytest.skip("two warpgroups cannot divide the sums of heads of 256")
    configs = (None, FUSED_CONFIGS[H]) if fused else (QUERY_CONFIGS[H], KEY_CONFIGS[H])
    held(draw(1, 192, 128, 1, 1, H), configs=configs, causal=True)


@slow
def test_float16():
    held(draw(1, 64, 128, 1, 1, 64, jnp.float16), causal=True, q_offset=64)


@newer
@pytest.mark.parametrize("configs", [pytest.param(SHARED, marks=slow), TOGETHER, FUSED])
def test_edges_that_no_block_fits(configs):
    held(draw(1, 72, 136, 2, 1, 64), configs=configs, causal=True, q_offset=64)


def check(rng, kind):
    """Asserts that a random `SeenBy`'s blocks, whole blocks and masks are those of brute force."""
    T, S = (int(n) for n in rng.integers(1, 40, 2))
    rows, block = (int(n) for n in rng.choice([4, 8], 2))
    causal, segmented = (bool(x) for x in rng.random(2) < (0.7, 0.2))
    window = jnp.int32(rng.integers(1, 30)) if rng.random() < 0.6 else None
    offset = jnp.int32(rng.integers(-20, 30))
    ids = [jnp.asarray(np.sort(rng.integers(0, 3, (1, 64))), jnp.int32) for _ in range(2)]
    sees = np.array(
        reference.mask(
            64, 64, causal=causal, window=window, q_offset=offset,
            q_segment_ids=ids[0] if segmented else None,
            kv_segment_ids=ids[1] if segmented else None,
        )[0]
    )  # fmt: skip
    by_keys = sees.T.reshape(64, -1, block)
    there = (np.arange(64) < T).reshape(-1, block)  # queries after the last weigh nothing
    seen_by = kind(causal, segmented, T, block, offset, window)
    for start in range(0, S, 2 * rows):  # two warpgroups a tile
        low, high = (int(x) for x in seen_by.blocks(jnp.int32(start), 2 * rows))
        visible = by_keys[start : start + 2 * rows] & there
        some = np.flatnonzero(visible.any((0, 2)))
        assert 0 <= low <= high and set(some) <= set(range(low, high))
        assert segmented or not some.size or list(some) == list(range(low, high))
        for first in (start, start + rows):
            begin, end = (int(x) for x in seen_by.whole(jnp.int32(first), rows, low, high))
            mine = by_keys[first : first + rows]
            full = np.flatnonzero((mine | ~there).all((0, 2)))
            assert low <= begin <= end <= high and set(range(begin, end)) <= set(full)
            if window is None and not segmented:
                assert end == high and (causal or begin == low)  # the kernel has no masked loop
            for j in range(low, high):
                both = ids[1][0, first : first + rows], ids[0][0, j * block : (j + 1) * block]
                mask = seen_by.mask((rows, block), j, jnp.int32(first), both, True)
                np.testing.assert_array_equal(mask, mine[:, j])


def check_many(kind):
    rng = np.random.default_rng(0)
    for _ in range(30):
        check(rng, kind)


def test_which_queries_see_keys_is_what_brute_force_says():
    check_many(SeenBy)


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("end", ["_newest", "_oldest"])
def test_one_query_too_many_or_too_few_is_found(end, by):
    right = getattr(SeenBy, end)
    wrong = type("Wrong", (SeenBy,), {end: lambda self, key: right(self, key) + jnp.int32(by)})
    with pytest.raises(AssertionError):
        check_many(wrong)


MISTAKES = {  # the module, the configs, S, what is replaced in its source by what
    "another's derivatives before they are there": (
        of_keys, FUSED, 128,
        [("plgpu.barrier_wait(ds_here.at[lax.rem(done + 1, 2)])", "pass")],
    ),
    "cotangents before they arrive": (
        of_keys, ALONE, 64,
        [(
            "plgpu.barrier_wait(dout_here.at[slot])\n                    begin(dp, values, "
            "dout_smem.at[slot], transpose_b=True)\n                    products",
            "begin(dp, values, dout_smem.at[slot], transpose_b=True)\n                    products",
        )],
    ),
    "keys overwritten while they are read": (
        of_keys, FUSED, 128, [("plgpu.barrier_wait(keys_read.at[0])", "pass")]
    ),
    "keys before they arrive": (
        of_queries, ALONE, 64, [("plgpu.barrier_wait(k_here.at[k_slot])", "pass")]
    ),
    "queries before they arrive": (
        of_keys, ALONE, 64, [("plgpu.barrier_wait(mine_here.at[warpgroup])", "pass")]
    ),
    "values released early": (
        of_queries, ALONE, 192,
        [("release(v_smem, v_free, c.v_slots, j - low)", "pass"),
         ("plgpu.barrier_wait(v_here.at[v_slot])",
          "plgpu.barrier_wait(v_here.at[v_slot]); plgpu.barrier_arrive(v_free.at[v_slot])")],
    ),
}  # fmt: skip


def with_mistakes(monkeypatch, module, replacements):
    """A kernel's module made from its source with replacements, in its place."""
    source = Path(module.__file__).read_text()
    for right, wrong in replacements:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    mistaken = types.ModuleType("mistaken")
    monkeypatch.setitem(sys.modules, mistaken.__name__, mistaken)
    exec(source, mistaken.__dict__)
    name = module.__name__.rsplit("_", 1)[1]
    monkeypatch.setattr(backward, f"of_{name}", getattr(mistaken, f"of_{name}"))


@newer
@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_every_mistake_is_found(monkeypatch, name):
    module, configs, S, replacements = MISTAKES[name]
    with_mistakes(monkeypatch, module, replacements)
    with pytest.raises(RaceError):
        held(draw(1, 64 if configs is ALONE else 128, S, 1, 1, 64), configs=configs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=slow)])
@pytest.mark.parametrize("H", sorted(KEY_CONFIGS))
@pytest.mark.parametrize("everything", [pytest.param(False, marks=slow), True])
@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=slow)])
def test_the_kernels_lower_for_the_chip(deterministic, everything, H, dtype):
    B, T, S, N, K = 2, 1000, 1104, 4, 2
    q, k = (jax.ShapeDtypeStruct(s, dtype) for s in ((B, T, N, H), (B, S, K, H)))
    rows = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    options = {"causal": True}
    if everything:
        options |= {"soft_cap": 30.0, "window": 90, "q_offset": 50, "sinks": jnp.zeros(N)}
        options["segment_ids"] = segments(B, T, S)
    rule, extra = rule_of(options, H, S), extra_of(options, B)
    run = jax.jit(lambda *arrays: backward.gradients(rule, deterministic, *arrays, extra))
    lowered = run.trace(q, k, k, q, rows, q, rows).lower(lowering_platforms=("cuda",))
    kernels = 1 if H in FUSED_CONFIGS and WHOLE and not deterministic else 2
    assert lowered.as_text().count("custom_call @mosaic_gpu") == kernels
    for configs in (QUERY_CONFIGS, KEY_CONFIGS, FUSED_CONFIGS):
        if H in configs:
            assert configs[H].shared_memory(H) <= SHARED_MEMORY - 1024  # barriers need some
