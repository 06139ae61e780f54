"""The TPU's attention: in the TPU interpreter against the reference, and compiled for real chips.

Out of bounds and scratch that nothing was written to are NaN there, axes of the grid that are
declared parallel run in random order, and a detector looks for unordered accesses to memory.
"""

import functools
import importlib

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import mosaic_tpu, mosaic_tpu_blocks, reference
from pallas_kernels.flash_attention.mosaic_tpu import Blocks
from pallas_kernels.flash_attention.mosaic_tpu_blocks import Call, Mask
from tests.pallas_kernels.tpu_topology import CHIPS, compile_for, kernels, needs_libtpu

SMALL = Blocks(128, 128)
interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")


def interpreted(*arrays, cores=1, **case):
    params = pltpu.InterpretParams(detect_races=True, random_seed=1, num_cores_or_threads=cores)
    return mosaic_tpu.attention(*arrays, blocks=SMALL, interpret=params, **case)


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def inputs(B, T, S, N, K, H, dtype=jnp.float32):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(normal(shape, i, dtype) for i, shape in enumerate(shapes))


def results(attention, **case):
    """A compiled (out, lse, gradients) of a loss that pulls on both, given q, k, v and changes."""

    @jax.jit
    def run(q, k, v, sinks, changes):
        def loss(q, k, v, sinks):
            out, lse = attention(q, k, v, sinks=sinks, **case, **changes)
            pull = jnp.where(jnp.isfinite(lse), lse * normal(lse.shape, 4), 0.0)
            return jnp.sum(out.astype(jnp.float32) * normal(out.shape, 3)) + jnp.sum(pull), (
                out,
                lse,
            )

        wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        gradient = jax.value_and_grad(loss, argnums=wanted, has_aux=True)
        (_, (out, lse)), gradients = gradient(q, k, v, sinks)
        return out, lse, *gradients

    return run


def distance(found, wanted):
    """The largest difference of any result, in units of that result's size; NaN counts as 1."""
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if one.shape != other.shape or not np.array_equal(np.isneginf(one), np.isneginf(other)):
            return np.inf
        finite = np.isfinite(other)
        difference = np.where(finite, np.nan_to_num(one, nan=1e9) - np.where(finite, other, 0), 0)
        worst = max(worst, np.abs(difference).max() / max(np.abs(other[finite]).max(initial=0), 1))
    return worst


def check(arrays, sinks=None, changes=({},), bound=1e-5, **case):
    """Holds interpreted results to the reference's for each of the changes; returns the last."""
    ours, theirs = results(interpreted, **case), results(reference.attention, **case)
    for change in changes:
        found = jax.block_until_ready(ours(*arrays, sinks, change))
        exact = tuple(x.astype(jnp.float32) for x in arrays)
        assert distance(found, theirs(*exact, sinks, change)) < bound, change
        assert not interpreter.races.races_found
    return found


def test_positions_windows_and_rows_that_see_nothing():
    changes = [
        {"window": jnp.int32(window), "q_offset": jnp.asarray(offsets)}
        for window, offsets in [(2**31 - 1, [0, 129]), (90, [200, -100])]
    ]
    arrays = inputs(2, 140, 260, 2, 1, 64)
    out, lse, dq, *_ = check(arrays, changes=changes, causal=True)
    unseeing = np.isneginf(lse)[1].T
    assert 0 < unseeing.sum() < unseeing.size
    assert not np.asarray(out)[1][unseeing].any() and not np.asarray(dq)[1][unseeing].any()


def test_segments_soft_cap_and_sinks():
    B, T, S, N = 2, 200, 140, 2
    ids = jnp.asarray(np.random.default_rng(5).integers(0, 3, (B, T + S)), jnp.int32)
    ids = ids.at[1, T:].set(7)  # whose queries see their sink alone
    case = {"segment_ids": (ids[:, :T], ids[:, T:]), "soft_cap": 2.0, "scale": 0.5}
    check(inputs(B, T, S, N, 2, 64), sinks=jnp.asarray([0.5, -1.0]), **case)


def test_a_window_known_when_compiled_shortens_the_loop():
    mask = Mask(1024, 1024, 128, 128, True, True, False, 100)
    assert (mask.key_blocks, mask.key_steps, mask.query_steps) == (8, 3, 3)
    check(inputs(1, 390, 450, 2, 1, 64), causal=True, window=100, q_offset=50)


@pytest.mark.slow
def test_a_window_to_both_sides_and_logits_beyond_the_range_of_exp():
    q, k, v = inputs(1, 130, 257, 1, 1, 256)
    out, lse, *_ = check((100 * q, k, v), window=60, q_offset=9, bound=1e-4)
    assert np.max(lse) > 100 and np.isfinite(out).all()


@pytest.mark.slow
def test_one_query_and_many_keys():
    check(inputs(1, 1, 300, 4, 2, 64), causal=True, q_offset=290)


@pytest.mark.slow
def test_one_key():
    check(inputs(1, 13, 1, 2, 2, 64), causal=True, q_offset=-4)


def test_bfloat16_without_a_mask():
    arrays = inputs(1, 128, 256, 2, 2, 128, jnp.bfloat16)
    out, lse, *gradients = check(arrays, bound=0.02)
    assert lse.dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in (out, *gradients))


def one_block_less(name):
    real = getattr(Mask, name)

    def wrong(*args):
        first, last = real(*args)
        return first, last - 1

    return Mask, name, wrong


def one_key_more(self, *args):
    return VISIBLE(self, *args[:-2], args[-2] + 1, args[-1])


VISIBLE = Mask.visible
WRONG = {  # the mistake, and which results show it
    "a block of keys left out": (one_block_less("keys_of"), "forward"),
    "mask off by one": ((Mask, "visible", one_key_more), "forward"),
    "a block of queries left out": (one_block_less("queries_of"), "backward"),
    "soft cap left out": ((Call, "through_cap", lambda self, d, _: d), "backward"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "soft cap left out" else ()) for n in WRONG],
)
def test_the_check_rejects(name, monkeypatch):
    mistake, shown = WRONG[name]
    monkeypatch.setattr(*mistake)
    case = {"causal": True, "window": 100, "soft_cap": 2.0}
    arrays = inputs(1, 130, 130, 1, 1, 64)
    if shown == "forward":
        found, wanted = (f(*arrays, **case) for f in (interpreted, reference.attention))
    else:
        ours, theirs = results(interpreted, **case), results(reference.attention, **case)
        found, wanted = (f(*arrays, None, {}) for f in (ours, theirs))
        assert distance(found[:2], wanted[:2]) < 1e-5
    assert distance(found, wanted) > 1e-2


def test_the_check_rejects_edges_that_are_not_masked(monkeypatch):
    for module in ("mosaic_tpu", "mosaic_tpu_backward"):
        path = f"pallas_kernels.flash_attention.{module}.existing"
        monkeypatch.setattr(path, lambda block, index, size: block)
    arrays = inputs(1, 130, 130, 1, 1, 64)
    found = results(interpreted)(*arrays, None, {})
    assert all(np.isnan(x).any() for x in (found[0], *found[2:]))


MANY = jnp.arange(60, dtype=jnp.int32)


def test_blocks_meet_where_a_pair_is_visible_and_only_what_meets_is_fetched():
    rng = np.random.default_rng(0)
    for _ in range(20):
        T, S, window = (int(rng.integers(1, 60)) for _ in range(3))
        queries, keys = (int(rng.integers(1, 9)) for _ in range(2))
        causal, windowed, known = (bool(x) for x in rng.integers(0, 2, 3))
        offset = jnp.int32(rng.integers(-20, 60))
        span = window if windowed and known else None
        mask = Mask(T, S, queries, keys, causal, windowed, False, span)
        exact = reference.mask(
            60, 60, causal=causal, window=window if windowed else None, q_offset=offset,
            q_segment_ids=None, kv_segment_ids=None,
        )  # fmt: skip
        pairs = np.zeros((mask.query_blocks, queries, mask.key_blocks, keys), bool)
        pairs.reshape(mask.query_blocks * queries, -1)[:T, :S] = exact[0, :T, :S]
        meet = pairs.any((1, 3))
        whole = np.asarray(mask.whole(MANY[:, None], MANY, offset, jnp.int32(window)))
        np.testing.assert_array_equal(whole[: len(meet), : len(meet.T)], pairs.all((1, 3)))
        check_range(meet, mask.keys_of, mask.key_steps, offset, window)
        check_range(meet.T, mask.queries_of, mask.query_steps, offset, window)


def check_range(meet, range_of, steps, offset, window):
    """Holds the blocks computed and fetched, a row of `meet` each, to those that meet."""

    def of_block(i):
        first, last = range_of(i, offset, jnp.int32(window))
        held = jax.vmap(lambda step: mosaic_tpu_blocks.at(first, last, step, meet.shape[1]))
        return first, last, held(MANY)

    for seen, first, last, held in zip(
        meet, *map(np.asarray, jax.vmap(of_block)(MANY)), strict=False
    ):
        computed = list(range(first, min(last + 1, first + steps)))
        if seen.any():
            assert computed == list(range(seen.argmax(), np.nonzero(seen)[0].max() + 1))
            assert list(held[: len(computed)]) == computed
        assert len(set(held[:steps])) == max(len(computed), 1)


def test_what_does_not_fit_is_refused():
    reason = functools.partial(mosaic_tpu.refusal, platform="tpu", dtype=jnp.bfloat16, H=128)
    assert reason() is None
    assert "TPU" in reason(platform="cpu")
    assert "float16" in reason(dtype=jnp.float16)
    assert "96" in reason(H=96)
    q, k, v = inputs(1, 8, 8, 1, 1, 64)
    with pytest.raises(ValueError, match=r"q\(1, 8, 1, 32\).*head width of 64"):
        mosaic_tpu.attention(q[..., :32], k[..., :32], v[..., :32])
    with pytest.raises(ValueError, match="no queries or no keys"):
        mosaic_tpu.attention(q, k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match="not multiples of 128"):
        mosaic_tpu.attention(q, k, v, blocks=Blocks(64, 128))


def test_devices_of_a_shard_map_run_it_on_their_own_rows():
    arrays = inputs(2, 130, 130, 2, 1, 64)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")

    def sharded(q, k, v, **case):
        local = functools.partial(mosaic_tpu.attention, blocks=SMALL, interpret=True, **case)
        return jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)(q, k, v)

    wanted = results(reference.attention, causal=True)(*arrays, None, {})
    assert distance(results(sharded, causal=True)(*arrays, None, {}), wanted) < 1e-5


@pytest.mark.slow
def test_two_cores_share_the_grid_without_a_race():
    two = functools.partial(interpreted, cores=2)
    arrays = inputs(1, 257, 257, 2, 1, 64)
    found = jax.block_until_ready(results(two, causal=True)(*arrays, None, {}))
    assert distance(found, results(reference.attention, causal=True)(*arrays, None, {})) < 1e-5
    assert not interpreter.races.races_found


ALL = {"causal": True, "soft_cap": 30.0}
COMPILED = {  # (B, T, S, N, K, H), dtype, what is known, what is an array
    "long": ((2, 4096, 4096, 8, 2, 128), jnp.bfloat16, {"causal": True}, False),
    "everything, 64 wide": ((1, 1000, 1024, 4, 2, 64), jnp.bfloat16, ALL, True),
    "everything, 256 wide": ((1, 1024, 1000, 4, 2, 256), jnp.float32, ALL, True),
    "short loop": ((1, 4096, 4096, 2, 1, 64), jnp.bfloat16, {"causal": True, "window": 512}, False),
    "no mask": ((1, 512, 1024, 2, 2, 256), jnp.bfloat16, {}, False),
    "one query": ((2, 1, 1000, 8, 2, 128), jnp.bfloat16, {"causal": True, "q_offset": 999}, False),
    "one key": ((2, 7, 1, 2, 2, 64), jnp.bfloat16, {}, False),
    "less than a tile": ((1, 13, 70, 2, 2, 64), jnp.bfloat16, ALL, True),
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("chip", CHIPS)
def test_it_compiles_for_the_chip(chip, name):
    (B, T, S, N, K, H), dtype, case, everything = COMPILED[name]
    q, k = (jax.ShapeDtypeStruct(x, dtype) for x in ((B, T, N, H), (B, S, K, H)))
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    arrays = {}
    if everything:
        arrays = {
            "segment_ids": (integers((B, T)), integers((B, S))),
            "window": integers(()),
            "q_offset": integers((B,)),
            "sinks": jax.ShapeDtypeStruct((N,), jnp.float32),
        }

    def forward(q, k, v, arrays):
        return mosaic_tpu.attention(q, k, v, **case, **arrays)

    def loss(*args):
        out, lse = forward(*args)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    assert kernels(compile_for(chip, forward, q, k, k, arrays)) == 1
    assert kernels(compile_for(chip, jax.grad(loss, argnums=(0, 1, 2)), q, k, k, arrays)) == 3
