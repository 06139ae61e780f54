"""Attention over pages on Hopper, interpreted with the race detector, and lowered for the chip."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention.mosaic_gpu_config import SHARED_MEMORY
from pallas_kernels.interpreter import RaceError, interpret
from pallas_kernels.paged_attention import mosaic_gpu, paged_attention
from pallas_kernels.paged_attention.mosaic_gpu import CONFIGS, TILE, Config, _Call
from pallas_kernels.paged_attention.rows import Sight
from tests.pallas_kernels.paged_cases import Batch

SHAPE: dict[str, Any] = {"N": 2, "K": 1, "H": 64, "page": 16, "M": 5, "dtype": jnp.float16}
SPLIT = Config(split=64)
CASES = {
    "decode, every option, pages of garbage": {
        "rows": [(1, 9), (0, 5), (1, 70)],
        "options": {"soft_cap": 2.0, "window": 30, "sinks": [0.5, -1.0]},
    },
    "mixed, three heads a key head, small pages": {
        "rows": [(1, 20), (25, 77)], "N": 3, "page": 8, "options": {"window": 40},
    },
    "large pages, a ring that wraps": {
        "rows": [(2, 155), (1, 3)], "N": 4, "K": 2, "page": 128, "M": 2,
    },
}  # fmt: skip
FAST, SPLITS, _ = CASES


def held(name, **more):
    """The interpreted kernel gives the mathematics, and no two accesses race."""
    batch = Batch(**{**SHAPE, **CASES[name]})
    np.testing.assert_allclose(run(batch, **more), batch.wanted(), atol=0.01)


def run(batch, **more):
    arrays, options = batch.arguments()

    def kernel(*arrays, interpret):
        call = functools.partial(
            mosaic_gpu.paged_attention, config=SPLIT, interpret=interpret, **options, **more
        )
        return jax.jit(call)(*arrays)

    return np.asarray(interpret(kernel, *arrays), np.float64)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == FAST else pytest.mark.slow) for n in CASES]
)
def test_a_case_is_the_mathematics(name):
    held(name, invariant=name == SPLITS)


def test_multiplying_by_keys_that_have_not_arrived_is_caught(monkeypatch):
    """The wait before the product with k is left out."""
    wait, skipped = mosaic_gpu.plgpu.barrier_wait, []

    def forgetful(barrier):
        if not skipped and inspect.stack()[1].function == "step":
            skipped.append(barrier)
        else:
            wait(barrier)

    monkeypatch.setattr(mosaic_gpu.plgpu, "barrier_wait", forgetful)
    with pytest.raises(RaceError):
        run(Batch([(1, 64)], **SHAPE))
    assert skipped


@pytest.mark.slow
def test_values_of_places_past_the_end_would_leak(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_zero_past", lambda *_: None)
    with pytest.raises(AssertionError):
        held(FAST)


@pytest.mark.slow
def test_bits_depend_on_the_row_alone():
    """In a chunk among others, and one query at a time in a wider table."""
    chunk = Batch([(1, 9), (14, 70)], numbers=[0, 7], **SHAPE)
    step = Batch([(1, 66), (1, 70)], numbers=[1, 7], seed=2, **{**SHAPE, "M": 9})
    np.testing.assert_array_equal(run(step)[1], run(chunk, invariant=True)[-1])


def seen_by(sight, position, last, keys):
    """What the definition says of queries at `position` to `last`, [last - position + 1, keys]."""
    queries, keys = np.arange(position, last + 1)[:, None], np.arange(keys)[None]
    seen = keys <= queries
    return seen if sight.window is None else seen & (keys > queries - sight.window)


def random_sight(rng):
    window = int(rng.integers(1, 300)) if rng.random() < 0.5 else None
    return Sight(int(rng.integers(1, 9)), window)


def wrong_masks(mask):
    """In how many of some random tiles and runs of keys `mask` is not what the definition says."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(40):
        sight, position = random_sight(rng), int(rng.integers(0, 200))
        size = TILE // sight.G
        exact = seen_by(sight, position, position + size - 1, 320).repeat(sight.G, axis=0)
        row, key = np.arange(size * sight.G)[:, None], np.arange(320)[None] - position
        wrong += not np.array_equal(mask(sight, row, key), exact)
    return wrong


def test_masks_are_those_of_the_definition():
    def one_key_more(sight, row, key):
        window = None if sight.window is None else sight.window + 1
        return dataclasses.replace(sight, window=window).mask(row, key)

    assert not wrong_masks(Sight.mask)
    assert wrong_masks(one_key_more)
    assert wrong_masks(lambda sight, row, key: sight.mask(row, key - 1))


def test_splits_and_steps_hold_every_key_that_is_seen_and_few_more():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sight, position = random_sight(rng), int(rng.integers(0, 500))
        call = _Call(sight, 16, 1.0, None, 128, 5, SPLIT, True)
        last = position + int(rng.integers(0, 16))
        runs = seen_by(sight, position, last, 640).any(axis=0).reshape(10, TILE).any(axis=1)
        ends = np.int32(position), np.int32(last)
        begin, end = (int(x) for x in call.range_of_splits(*ends))
        visited = np.zeros(10, bool)
        for split in range(call.splits):
            low, high = (int(x) for x in call.steps(np.int32(split), *ends))
            assert (low < high) == (begin <= split < end)
            visited[low : max(low, high)] = True
        np.testing.assert_array_equal(visited, runs)
    assert call.range_of_splits(np.int32(-1), np.int32(-1)) == (0, 0)  # a tile without queries


def merged(merge):
    """(softmax of all keys, what `merge` makes of three splits, the last one never written)."""
    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal((3, 2, 2, 32))  # tiles, key heads, rows, keys
    values = rng.standard_normal((3, 2, 2, 32, 8))
    sinks = np.asarray([[0.5, -np.inf], [1.0, 9.0]])
    parts, lse = np.full((3, 3, 2, 2, 8), np.nan), np.full((3, 3, 2, 2), np.nan)
    for i in range(2):
        keys = slice(i * 16, (i + 1) * 16)
        weights = np.exp(logits[..., keys])
        total = weights.sum(-1)
        parts[:, i] = np.einsum("xkrs,xkrsh->xkrh", weights, values[..., keys, :])
        parts[:, i] /= total[..., None]
        lse[:, i] = np.log2(total)
    weights = np.exp(logits)
    total = weights.sum(-1) + np.exp(sinks)
    exact = np.einsum("xkrs,xkrsh->xkrh", weights, values) / total[..., None]
    arrays = (jnp.asarray(x, jnp.float32) for x in (parts, lse))
    tops = jnp.asarray(sinks * np.log2(np.e), jnp.float32)
    return exact, merge(*arrays, jnp.zeros(3, jnp.int32), jnp.full(3, 2), tops)


def test_the_merge_is_the_softmax_over_all_keys():
    np.testing.assert_allclose(*reversed(merged(mosaic_gpu._merge)), atol=1e-5)

    def without_rescaling(parts, lse, *rest):
        return mosaic_gpu._merge(parts, lse * 0, *rest)

    exact, found = merged(without_rescaling)
    assert np.abs(found - exact).max() > 0.1


EVERY = {"window": 300, "soft_cap": 30.0, "sinks": jnp.zeros(12)}


@pytest.mark.parametrize(
    ("T", "dtype", "H", "page", "options"),
    [(4, jnp.bfloat16, 64, 16, {}), (4, jnp.float16, 128, 8, EVERY),
     (100, jnp.bfloat16, 128, 64, EVERY), (100, jnp.bfloat16, 256, 128, {})],
)  # fmt: skip
def test_it_lowers_for_the_chip(T, dtype, H, page, options):
    shape, whole = jax.ShapeDtypeStruct, jnp.int32
    pages = shape((50, 4, page, H), dtype)
    run = functools.partial(mosaic_gpu.paged_attention, scale=0.1, **options)
    arrays = (
        shape((T, 12, H), dtype), pages, pages, shape((4, 64), whole), shape((5,), whole),
        shape((4,), whole),
    )  # fmt: skip
    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert shared_memory(H) <= SHARED_MEMORY - 1024  # barriers need some


def shared_memory(H):
    """Bytes of a tile's queries, keys, values and parts."""
    return TILE * (2 * H * (1 + 2 * CONFIGS[H].slots) + 4 * H + 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": jnp.float32}, "not float32"),
        ({"pages_dtype": "int8"}, "not int8"),
        ({"H": 96}, "head width of 64, 128, 256, not 96"),
        ({"page": 12}, "not 12"),
        ({"N": 65}, "not 65"),
        ({"scale": 0.0}, "scale above zero"),
        ({"soft_cap": -1.0}, "soft cap above zero"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    facts = {"dtype": jnp.float16, "pages_dtype": jnp.float16, "page": 16, "N": 2, "K": 1, "H": 64}
    assert mosaic_gpu.refusal(platform="gpu", **facts) is None
    assert says in (mosaic_gpu.refusal(platform="gpu", **(facts | change)) or "")


def test_a_cpu_is_refused_and_errors_name_what_does_not_fit():
    arrays, options = Batch([(1, 3)], N=2, K=1, H=64, page=12, dtype=jnp.float16).arguments()
    with pytest.raises(ValueError, match="arrays are on cpu"):
        paged_attention(*arrays, **options, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"k_pages\(\d+, 1, 12, 64\): the kernel takes pages of 8"):
        mosaic_gpu.paged_attention(*arrays, **options)
