"""Attention on Hopper, interpreted with the race detector, and lowered for the chip."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.flash_attention import mosaic_gpu, reference
from pallas_kernels.flash_attention.mosaic_gpu_config import CONFIGS, SHARED_MEMORY, Config
from pallas_kernels.flash_attention.sight import Sight
from pallas_kernels.interpreter import WHOLE, RaceError, interpret

newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")
slow = pytest.mark.slow
SMALL = Config(block_kv=64, warpgroups=2)


def draw(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(shape[1]).normal(size=shape), dtype)


def runs(*lengths):
    """Segment ids in runs of `lengths`."""
    return jnp.asarray([np.repeat(np.arange(len(lengths)), lengths)], jnp.int32)


CASES = {  # (B, T, S, N, K, H), options
    "causal, one key head of two": ((1, 128, 128, 2, 1, 64), {"causal": True}),
    "causal, more tiles": ((1, 256, 256, 1, 1, 64), {"causal": True}),
    "full": ((1, 128, 192, 2, 2, 64), {"scale": 0.3}),
    "rows that see nothing": (
        (2, 128, 128, 1, 1, 64), {"causal": True, "q_offset": jnp.asarray([64, -40])}
    ),
    "segments": (
        (1, 128, 128, 2, 1, 64),
        {"causal": True, "segment_ids": (runs(40, 50, 38), runs(30, 60, 38))},
    ),
    "sinks": ((1, 128, 128, 2, 1, 64), {"sinks": jnp.asarray([0.5, -jnp.inf])}),
    "soft cap": ((1, 128, 128, 1, 1, 64), {"soft_cap": 2.0}),
    "window and sink": (
        (1, 128, 192, 1, 1, 64),
        {"causal": True, "window": 70, "q_offset": 64, "sinks": jnp.asarray([0.5])},
    ),
    "window, a traced one": ((1, 128, 192, 1, 1, 64), {"window": jnp.int32(50)}),
}  # fmt: skip
FAST = ("causal, one key head of two", "window and sink")


def held(shape, options, dtype=jnp.bfloat16, config=SMALL):
    """The interpreted kernel gives the reference's output and log-sum-exp."""
    B, T, S, N, K, H = shape
    q, k, v = (
        draw(B, T, N, H, dtype=dtype),
        draw(B, S, K, H, dtype=dtype),
        draw(B, S, K, H, dtype=dtype),
    )
    v = jnp.flip(v, axis=1)

    def run(q, k, v, interpret):
        return mosaic_gpu.attention(q, k, v, config=config, interpret=interpret, **options)

    found = interpret(run, q, k, v)
    wanted = reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)), **options)
    out, lse = (np.asarray(x, np.float64) for x in found)
    # Half a unit in the last place of bfloat16, and what its weights lose.
    np.testing.assert_allclose(out, np.asarray(wanted[0]), rtol=2**-8, atol=0.01)
    np.testing.assert_allclose(lse, np.asarray(wanted[1]), atol=1e-5)  # infinities alike


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else slow) for n in sorted(CASES)]
)
def test_a_case_is_the_references(name):
    held(*CASES[name])


@slow
@pytest.mark.parametrize("H", [128, 256])
def test_wider_heads(H):
    held((1, 128, 128, 1, 1, H), {"causal": True})


@slow
def test_float16():
    held((1, 128, 128, 1, 1, 64), {"causal": True}, jnp.float16)


@newer
@pytest.mark.parametrize(("T", "S"), [(1, 1), (72, 136), (130, 75)])
def test_edges(T, S):
    held((1, T, S, 2, 1, 64), {"causal": True, "q_offset": max(0, S - T)})


@newer
def test_a_ring_that_wraps():
    held((1, 128, 512, 1, 1, 64), {})


def test_multiplying_by_keys_that_have_not_arrived_is_caught(monkeypatch):
    """The warpgroups' wait before the product with k is left out; every case above has it."""
    wait, skipped = mosaic_gpu.plgpu.barrier_wait, []

    def forgetful(barrier):
        if not skipped and inspect.stack()[1].function == "step":
            skipped.append(barrier)
        else:
            wait(barrier)

    monkeypatch.setattr(mosaic_gpu.plgpu, "barrier_wait", forgetful)
    with pytest.raises(RaceError):
        held((1, 128, 64, 1, 1, 64), {})
    assert skipped


class OffByOne(Sight):
    """Sees one key too many."""

    def _newest(self, query):
        return jnp.minimum(super()._newest(query) + 1, self.S - 1)


def test_a_mask_that_is_off_by_one_is_caught(monkeypatch):
    class Late(Sight):
        def mask(self, shape, block, first, segments, interpret):
            return super().mask(shape, block, first + 1, segments, interpret)

    monkeypatch.setattr(mosaic_gpu, "Sight", Late)
    with pytest.raises(AssertionError):
        held((1, 128, 128, 1, 1, 64), {"causal": True})


def visible(sight, T):
    """What the definition says: [T, S]."""
    positions, keys = np.arange(T)[:, None] + int(sight.offset), np.arange(sight.S)[None]
    seen = np.ones((T, sight.S), bool)
    if sight.causal:
        seen &= keys <= positions
    if sight.window is not None:
        seen &= keys > positions - int(sight.window)
    return seen


def wrong(sight, first, rows):
    """What `sight` says of queries first to first + rows against the definition."""
    seen = visible(sight, first + rows)[first:]
    low, high = (int(x) for x in sight.blocks(jnp.int32(first), rows))
    begin, end = (int(x) for x in sight.whole(jnp.int32(first), rows, low, high))
    blocks = -(-sight.S // sight.block)
    padded = np.pad(seen, ((0, 0), (0, blocks * sight.block - sight.S)))
    found = []
    for j in range(blocks):
        part = padded[:, j * sight.block : (j + 1) * sight.block]
        if part.any() and not low <= j < high:
            found.append(f"block {j} is left out")
        if begin <= j < end and not part.all():
            found.append(f"block {j} is not seen in full")
        mask = sight.mask((rows, sight.block), jnp.int32(j), jnp.int32(first), None, True)
        if not np.array_equal(np.asarray(mask), part):
            found.append(f"the mask of block {j}")
    if not low <= begin <= end <= high <= max(blocks, low):
        found.append(f"{low} {begin} {end} {high} of {blocks}")
    return found


def random_sights(kind, count=60):
    rng = np.random.default_rng(0)
    for _ in range(count):
        window = None if rng.random() < 0.6 else jnp.int32(rng.integers(1, 40))
        yield kind(
            causal=bool(rng.random() < 0.7), segmented=False, S=int(rng.integers(1, 60)), block=8,
            offset=jnp.int32(rng.integers(-9, 30)), window=window,
        ), int(rng.integers(0, 5)) * 4, 4  # fmt: skip


def test_blocks_and_masks_are_those_of_the_definition():
    for sight, first, rows in random_sights(Sight):
        assert not wrong(sight, first, rows), (sight, first)


def test_one_key_too_many_shows():
    assert any(wrong(sight, first, rows) for sight, first, rows in random_sights(OffByOne))


EVERY = {
    "causal": True, "window": 500, "soft_cap": 30.0, "q_offset": 7, "sinks": jnp.zeros(4),
    "segment_ids": (jnp.zeros((2, 1024), jnp.int32), jnp.zeros((2, 1000), jnp.int32)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=slow)])
@pytest.mark.parametrize("H", sorted(CONFIGS))
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="full", marks=slow),
        pytest.param({"causal": True}, id="causal", marks=slow),
        pytest.param(EVERY, id="every"),
    ],
)
def test_it_lowers_for_the_chip(H, dtype, options):
    shapes = ((2, 1024, 4, H), (2, 1000, 2, H), (2, 1000, 2, H))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    run = jax.jit(lambda q, k, v: mosaic_gpu.attention(q, k, v, **options))
    lowered = run.trace(*arrays).lower(lowering_platforms=("cuda",))
    rows = CONFIGS[H].warpgroups * CONFIGS[H].block_q
    # Copies of the log-sum-exp stay in their row: past its end is the next head's.
    assert f"tensor<2x4x{-(-1024 // rows) * rows}xf32>" in lowered.as_text()
    assert "mosaic_gpu" in lowered.as_text()
    assert CONFIGS[H].shared_memory(H) <= SHARED_MEMORY - 1024  # barriers need some


@pytest.mark.parametrize(
    ("H", "dtype", "options", "says"),
    [
        (64, jnp.float32, {}, "not float32"),
        (96, jnp.bfloat16, {}, "head width of 64, 128, 256, not 96"),
        (64, jnp.bfloat16, {"scale": 0.0}, "scale above zero"),
    ],
)
def test_what_does_not_fit_is_refused(H, dtype, options, says):
    x = jnp.zeros((1, 8, 1, H), dtype)
    with pytest.raises(ValueError, match=says):
        mosaic_gpu.attention(x, x, x, **options)
    assert says in mosaic_gpu.refusal(platform="gpu", dtype=dtype, H=H, **options)


def test_a_cpu_is_refused():
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="arrays are on cpu"):
        attention(x, x, x, implementation="mosaic_gpu")


@newer
@slow
@pytest.mark.parametrize("sinks", [None, jnp.asarray([[0.5], [-jnp.inf]])], ids=["", "sinks"])
def test_gradients_under_vmap_are_the_references(sinks):
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(2, 1, 64, 1, 64)), jnp.float16) for _ in range(4))
    sinks = () if sinks is None else (sinks,)

    def of(attention, dtype):
        def total(q, k, v, *sinks):
            named = dict(zip(("sinks",), sinks, strict=False))
            out, lse = attention(q, k, v, causal=True, **named)
            return jnp.sum(out.astype(jnp.float32) * dout[0].astype(jnp.float32)) + jnp.sum(lse)

        axes = (0, None, 0, *[0] * len(sinks))
        every = tuple(range(3 + len(sinks)))
        arrays = (q.astype(dtype), k[0].astype(dtype), v.astype(dtype), *sinks)
        return jax.jit(jax.vmap(jax.grad(total, every), axes))(*arrays)

    def run(interpret):
        return of(
            functools.partial(mosaic_gpu.attention, config=SMALL, interpret=interpret), q.dtype
        )

    for found, wanted in zip(interpret(run), of(reference.attention, jnp.float32), strict=True):
        bound = 0.02 * max(1.0, float(jnp.abs(wanted).max()))
        np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=0, atol=bound)
