"""Hopper's attention: interpreted with the race detector, held to the reference, and lowered."""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _compat
from pallas_kernels.flash_attention import mosaic_gpu, reference
from pallas_kernels.flash_attention.mosaic_gpu import CONFIGS, Config
from pallas_kernels.flash_attention.sight import Sight
from pallas_kernels.interpreter import WHOLE, RaceError, interpret

newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")
slow = pytest.mark.slow
SMALL = Config(64, 64, slots=2)
ALONE = Config(64, 64, slots=2, warpgroups=1)


def draw(B, T, S, N, K, H, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def segments(B, T, S):
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(np.sort(rng.integers(0, 3, (B, n))), jnp.int32) for n in (T, S))


def held(qkv, attention=mosaic_gpu.attention, config=SMALL, **options):
    """The interpreted kernel's output and log-sum-exp are the reference's; returns the latter."""
    out, lse = interpret(attention, *qkv, config=config, **options)
    wanted, wanted_lse = reference.attention(*(x.astype(jnp.float32) for x in qkv), **options)
    assert out.dtype == qkv[0].dtype and out.shape == wanted.shape
    assert lse.dtype == jnp.float32
    step = 0.01 if out.dtype == jnp.bfloat16 else 0.0015
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, rtol=0, atol=step)
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-5)
    unseen = np.isneginf(wanted_lse).swapaxes(1, 2)
    assert np.all(np.asarray(out, np.float32)[unseen] == 0)
    return wanted_lse


SINKS = jnp.asarray([0.5, -jnp.inf])
CASES = {  # B, T, S, N, K, and the options; three blocks of keys are more than the ring's slots
    "causal": ((1, 256, 256, 1, 1), {"causal": True}),
    "full": ((1, 128, 192, 1, 1), {}),
    "grouped": ((1, 128, 128, 4, 2), {"causal": True}),
    "scale": ((1, 128, 128, 1, 1), {"scale": 0.3}),
    "segments": ((2, 128, 128, 1, 1), {"segment_ids": segments(2, 128, 128), "causal": True}),
    "sinks": ((1, 128, 128, 2, 1), {"sinks": SINKS, "causal": True, "q_offset": -10}),
    "soft cap": ((1, 128, 128, 1, 1), {"soft_cap": 2.0}),
    "window": ((1, 128, 256, 1, 1), {"window": 70, "causal": True, "q_offset": 100}),
    "window, not causal": ((1, 128, 192, 1, 1), {"window": 70}),
}
FAST = ("full", "sinks", "window")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=slow) for name in sorted(CASES)]
)
def test_the_kernel_gives_the_reference_and_does_not_race(name):
    shape, options = CASES[name]
    held(draw(*shape, 64), **options)


def test_every_row_of_a_batch_has_its_offset_and_some_see_nothing():
    lse = held(draw(2, 128, 192, 1, 1, 64), causal=True, q_offset=jnp.asarray([64, -40]))
    assert np.isneginf(lse[1, 0]).sum() == 40


@slow
def test_every_option_at_once():
    held(
        draw(2, 128, 192, 2, 1, 64),
        causal=True, window=50, soft_cap=3.0, scale=0.2, sinks=SINKS,
        q_offset=jnp.asarray([70, -40]), segment_ids=segments(2, 128, 192),
    )  # fmt: skip


@slow
def test_a_traced_window():
    qkv = draw(1, 128, 192, 1, 1, 64)

    def windowed(q, k, v, *, window, interpret, **options):
        def run(width):
            return mosaic_gpu.attention(q, k, v, window=width, interpret=interpret, **options)

        return jax.jit(run)(jnp.int32(window))

    held(qkv, windowed, window=50, causal=True, q_offset=64)


@slow
@pytest.mark.parametrize("H", [128, 256])
def test_wider_heads(H):
    held(draw(1, 128, 128, 1, 1, H), causal=True)


@slow
def test_float16():
    held(draw(1, 128, 192, 1, 1, 64, jnp.float16), causal=True, q_offset=64)


RAGGED = {
    "few rows, long blocks": ((1, 72, 136, 1, 1), {}, Config(64, 128, slots=2)),
    "no multiples of 8": ((1, 101, 147, 2, 1), {"causal": True, "q_offset": 46}, SMALL),
    "one query": ((1, 1, 70, 2, 1), {"causal": True, "q_offset": 69}, SMALL),
    "segments": ((1, 130, 200, 1, 1), {"segment_ids": segments(1, 130, 200), "window": 50}, SMALL),
}


@newer
@pytest.mark.parametrize("name", sorted(RAGGED))
def test_edges_that_no_block_fits(name):
    shape, options, config = RAGGED[name]
    held(draw(*shape, 64), config=config, **options)


LONGEST = 64


def check(rng, kind):
    """Asserts that a random `Sight`'s blocks, whole blocks and masks are those of brute force."""
    T, S = rng.integers(1, 40, 2)
    rows, block = (int(n) for n in rng.choice([4, 8], 2))
    causal, segmented = (bool(x) for x in rng.random(2) < (0.7, 0.2))
    window = jnp.int32(rng.integers(1, 30)) if rng.random() < 0.6 else None
    offset = jnp.int32(rng.integers(-20, 30))
    ids = [jnp.asarray(np.sort(rng.integers(0, 3, (1, LONGEST))), jnp.int32) for _ in range(2)]
    sees = np.array(
        reference.mask(
            LONGEST, LONGEST, causal=causal, window=window, q_offset=offset,
            q_segment_ids=ids[0] if segmented else None,
            kv_segment_ids=ids[1] if segmented else None,
        )[0]
    )  # fmt: skip
    sees[:, S:] = False
    sight = kind(causal, segmented, int(S), block, offset, window)
    for start in range(0, T, 2 * rows):  # two warpgroups a tile
        low, high = (int(x) for x in sight.blocks(jnp.int32(start), 2 * rows))
        visible = sees[start : start + 2 * rows].reshape(2, rows, -1, block)
        some = np.flatnonzero(visible.any((0, 1, 3)))
        assert 0 <= low <= high and set(some) <= set(range(low, high))
        assert segmented or not some.size or list(some) == list(range(low, high))
        for half, first in enumerate((start, start + rows)):
            begin, end = (int(x) for x in sight.whole(jnp.int32(first), rows, low, high))
            full = np.flatnonzero(visible[half].all((0, 2)))
            assert low <= begin <= end <= high and set(range(begin, end)) <= set(full)
            assert segmented or list(full) == list(range(begin, end))
            if window is None and not segmented:
                assert begin == low  # the kernel has no masked loop before
            for j in range(low, high):
                both = (
                    ids[0][0, first : first + rows], ids[1][0, j * block : (j + 1) * block]
                )  # fmt: skip
                mask = sight.mask((rows, block), j, jnp.int32(first), both, True)
                np.testing.assert_array_equal(mask, visible[half, :, j])


def check_many(kind):
    rng = np.random.default_rng(0)
    for _ in range(60):
        check(rng, kind)


def test_a_sight_is_what_brute_force_says():
    check_many(Sight)


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("end", ["_newest", "_oldest"])
def test_a_sight_that_is_off_by_one_is_found(end, by):
    right = getattr(Sight, end)
    wrong = type("Wrong", (Sight,), {end: lambda self, query: right(self, query) + jnp.int32(by)})
    with pytest.raises(AssertionError):
        check_many(wrong)


@pytest.mark.parametrize(
    ("by", "q_offset"), [(-1, 1), pytest.param(1, 62, marks=slow)]
)  # the last row's last key begins a block; the first row sees all of a block but one key
def test_the_kernel_with_a_sight_off_by_one_is_wrong(monkeypatch, by, q_offset):
    right = Sight._newest
    monkeypatch.setattr(Sight, "_newest", lambda self, query: right(self, query) + jnp.int32(by))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        held(draw(1, 64, 128, 1, 1, 64), config=ALONE, causal=True, q_offset=q_offset)


MISTAKES = {  # what is replaced in the kernel's source, and by what
    "keys before they arrive": [("plgpu.barrier_wait(k_here.at[slot])", "pass")],
    "keys released early": [
        ("plgpu.barrier_arrive(k_free.at[slot])", "pass"),
        (
            "plgpu.barrier_wait(k_here.at[slot])",
            "plgpu.barrier_wait(k_here.at[slot]); plgpu.barrier_arrive(k_free.at[slot])",
        ),
    ],
    "last releases not waited for": [
        ("lax.min(high - low, c.slots)", "0"),
    ],
    "queries before they arrive": [("plgpu.barrier_wait(q_here.at[warpgroup])", "pass")],
    "slots filled while read": [("plgpu.barrier_wait(free.at[slot])", "pass")],
    "output copied before it is there": [("plgpu.commit_smem()", "pass")],
    "values before they arrive": [("plgpu.barrier_wait(v_here.at[slot])", "pass")],
    "values released early": [
        ("plgpu.barrier_arrive(v_free.at[slot])", "pass"),
        (
            "plgpu.barrier_wait(v_here.at[slot])",
            "plgpu.barrier_wait(v_here.at[slot]); plgpu.barrier_arrive(v_free.at[slot])",
        ),
    ],
}


def with_mistakes(monkeypatch, replacements):
    """The kernel's module, made from its source with the replacements."""
    source = Path(mosaic_gpu.__file__).read_text()
    for right, wrong in replacements:
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    module = types.ModuleType("mistaken")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    return module


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_every_mistake_is_found(monkeypatch, name):
    module = with_mistakes(monkeypatch, MISTAKES[name])
    with pytest.raises(RaceError, match=r"mistaken\.attention races"):
        held(draw(1, 128, 256, 1, 1, 64), module.attention, module.Config(64, 64, slots=2))


@slow
def test_the_source_without_mistakes_passes(monkeypatch):
    module = with_mistakes(monkeypatch, [])
    held(draw(1, 128, 256, 1, 1, 64), module.attention, module.Config(64, 64, slots=2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("H", sorted(CONFIGS))
@pytest.mark.parametrize("everything", [False, True])
def test_the_kernel_lowers_for_the_chip(everything, H, dtype):
    B, T, S, N, K = 2, 1000, 1100, 4, 2
    given = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, H)}
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in given.items()}
    options = {"causal": True}
    if everything:
        options["soft_cap"] = 30.0
        arrays |= {
            "window": jax.ShapeDtypeStruct((), jnp.int32),
            "q_offset": jax.ShapeDtypeStruct((B,), jnp.int32),
            "segment_ids": tuple(jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (T, S)),
            "sinks": jax.ShapeDtypeStruct((N,), jnp.float32),
        }
    run = jax.jit(lambda arrays: mosaic_gpu.attention(**arrays, **options))
    lowered = run.trace(arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert CONFIGS[H].shared_memory(H) <= mosaic_gpu.SHARED_MEMORY - 1024  # barriers need some


TAKEN = {"platform": "gpu", "dtype": jnp.bfloat16, "H": 128, "scale": 0.1, "capability": "9.0"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, None),
        ({"scale": None}, None),
        ({"dtype": jnp.float32}, "takes bfloat16 and float16, not float32"),
        ({"H": 96}, "head width of 64, 128, 256, not 96"),
        ({"scale": 0.0}, "scale above zero, not 0"),
        ({"platform": "cpu"}, "needs an NVIDIA Hopper GPU, and arrays are on cpu"),
        ({"capability": "10.0"}, "capability 9.0 (Hopper), not 10.0"),
    ],
)
def test_what_the_kernel_refuses(monkeypatch, changed, says):
    facts = TAKEN | changed
    monkeypatch.setattr(_compat, "compute_capability", lambda: facts["capability"])
    reason = mosaic_gpu.refusal(**facts)
    assert reason is None if says is None else says in reason


@pytest.mark.parametrize(
    ("H", "dtype", "scale", "says"),
    [
        (64, jnp.float32, None, r"q\(1, 8, 2, 64\), k\(1, 16, 1, 64\): .* not float32"),
        (96, jnp.bfloat16, None, "not 96"),
        (64, jnp.bfloat16, 0.0, "scale above zero"),
    ],
)
def test_a_call_that_does_not_fit_raises(H, dtype, scale, says):
    with pytest.raises(ValueError, match=says):
        mosaic_gpu.attention(*draw(1, 8, 16, 2, 1, H, dtype), scale=scale)


def test_the_gradient_is_refused_and_says_what_has_one():
    q, k, v = draw(1, 128, 128, 1, 1, 64)
    with pytest.raises(ValueError, match="no gradient yet; take 'cudnn' or 'triton'"):
        jax.grad(lambda q: jnp.sum(mosaic_gpu.attention(q, k, v)[0].astype(jnp.float32)))(q)
