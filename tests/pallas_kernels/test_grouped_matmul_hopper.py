"""The Hopper kernels of the grouped product, interpreted with the race detector, and lowered."""

import functools
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import (
    Config,
    configs,
    mosaic_gpu,
    mosaic_gpu_wgrad,
    ping_pong,
)
from pallas_kernels.interpreter import WHOLE, RaceError, interpret
from pallas_kernels.matmul.mosaic_gpu import SHARED_MEMORY
from tests.pallas_kernels.test_grouped_matmul import draw, exact

newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")
SMALL = Config(64, 64, slots=3)

# Counts, M, K, N, the schedule
CASES = {
    "edges within a piece": ([3, 70, 0, 50], 128, 64, 64, SMALL),
    "one group": ([128], 128, 128, 64, SMALL),
    "rows behind": ([0, 9, 4], 200, 64, 64, SMALL),
    "several pieces a tile": ([100, 0, 37, 90], 256, 128, 128, Config(128, 128, slots=2)),
    "three pieces across": ([150, 106], 256, 64, 192, Config(64, 192, slots=2)),
    # No slot is used twice: whoever does not wait for it cannot hold up the one who fills it.
    "a step a tile": ([64], 64, 64, 64, SMALL),
}
slow = {name: [] if name == "edges within a piece" else pytest.mark.slow for name in CASES}
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow[name]) for name in sorted(CASES)]
)


def case(name, dtype=jnp.bfloat16):
    """x, w, counts and dy; what is behind the last group is NaN."""
    counts, M, K, N, _ = CASES[name]
    x, dy = draw(M, K), draw(M, N, seed=1)
    behind = (np.arange(M) >= sum(counts))[:, None]
    x, dy = (jnp.where(behind, jnp.nan, a).astype(dtype) for a in (x, dy))
    return x, draw(len(counts), K, N, seed=2, dtype=dtype), jnp.asarray(counts, jnp.int32), dy


def close(found, wanted):
    """Within half a step of bfloat16, and of no more than the largest value's share."""
    found = np.asarray(found, np.float64)
    return np.allclose(found, wanted, rtol=2.0**-8, atol=2.0**-11 * np.abs(wanted).max())


def product(x, w, counts, *, config, transpose_w=False, interpret=False):
    return mosaic_gpu.grouped_matmul(
        x, w, counts, config=config, transpose_w=transpose_w, interpret=interpret
    )


@every
def test_product(name):
    x, w, counts, dy = case(name)
    found = interpret(product, x, w, counts, config=CASES[name][-1])
    assert close(found, exact(x, w, counts, dy)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_gradient_of_rows(name):
    x, w, counts, dy = case(name)
    found = interpret(product, dy, w, counts, config=CASES[name][-1], transpose_w=True)
    assert close(found, exact(x, w, counts, dy)[1])


@every
def test_gradient_of_matrices(name):
    x, w, counts, dy = case(name)
    found = interpret(mosaic_gpu_wgrad.wgrad, x, dy, counts, config=CASES[name][-1])
    assert close(found, exact(x, w, counts, dy)[2])


def slopes(x, w, counts, dy, *, interpret):
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, counts, interpret=interpret), x, w)
    return out, *pull(dy)


@newer
@pytest.mark.slow
def test_shapes_that_are_padded_inside():
    """The public function, its gradients, and tiles that reach past every edge."""
    counts, M, K, N = [3, 17, 0, 9], 45, 40, 72
    arrays = (
        draw(M, K, dtype=jnp.float16), draw(4, K, N, seed=2, dtype=jnp.float16),
        jnp.asarray(counts), draw(M, N, seed=1, dtype=jnp.float16),
    )  # fmt: skip
    for got, want in zip(interpret(slopes, *arrays), exact(*arrays), strict=True):
        assert close(got, want)


def one_of_each(x, w, counts, *, interpret):
    of_one = functools.partial(grouped_matmul, config=SMALL, interpret=interpret)
    return jax.vmap(of_one, (0, None, 0))(x, w, counts)


@newer
@pytest.mark.slow
def test_vmap_makes_one_kernel_of_all():
    x, w, counts, dy = case("edges within a piece")
    rows, sizes = jnp.stack([x, -x]), jnp.stack([counts, counts[::-1]])
    found = interpret(one_of_each, rows, w, sizes)
    for i in range(2):
        assert close(found[i], exact(rows[i], w, sizes[i], dy)[0])


# The module, the kernel that shows it, what is replaced in its source by what.
ARRIVED = "plgpu.barrier_wait(ring.arrived.at[slot + warpgroup * ring.slots])"
MISTAKES = {
    "products before their operands arrive": (ping_pong, product, ARRIVED, "pass"),
    "slots filled while they are read": (
        ping_pong, product, "plgpu.barrier_wait(ring.free.at[slot])", "pass"
    ),
    "slots handed back before products end": (
        ping_pong, product,
        "reads_end(self.a.at[slot], self.b.at[slot], interpret=self.interpret)\n"
        "        plgpu.barrier_arrive(self.free.at[slot])",
        "plgpu.barrier_arrive(self.free.at[slot])\n"
        "        reads_end(self.a.at[slot], self.b.at[slot], interpret=self.interpret)",
    ),
    "a piece overwritten while it leaves": (
        mosaic_gpu, product, "plgpu.wait_smem_to_gmem(0 if first else 1, wait_read_only=True)",
        "pass",
    ),
    "a piece that leaves before it is seen": (
        mosaic_gpu, product, "plgpu.commit_smem()\n        rows", "rows"
    ),
    "an edge that leaves before it is seen": (
        mosaic_gpu, product, "plgpu.commit_smem()\n        at = begin", "at = begin"
    ),
}  # fmt: skip


def with_mistake(monkeypatch, module, right, wrong):
    """A module made from its source with a replacement, in its place."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, right
    mistaken = types.ModuleType("mistaken")
    monkeypatch.setitem(sys.modules, mistaken.__name__, mistaken)
    exec(source.replace(right, wrong), mistaken.__dict__)
    for name, value in vars(mistaken).items():
        if getattr(value, "__module__", None) == mistaken.__name__ and callable(value):
            monkeypatch.setattr(module, name, value)


EARLIEST = "products before their operands arrive"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == EARLIEST else [pytest.mark.slow, newer])
        for name in sorted(MISTAKES)
    ],
)
def test_every_mistake_is_found(monkeypatch, name):
    module, kernel, right, wrong = MISTAKES[name]
    with_mistake(monkeypatch, module, right, wrong)
    case_name = "a step a tile" if name == EARLIEST else "three pieces across"
    x, w, counts, _ = case(case_name)
    with pytest.raises(RaceError):
        interpret(kernel, x, w, counts, config=CASES[case_name][-1])


@pytest.mark.slow
@pytest.mark.parametrize("only", [0, 1])
def test_rows_of_others_would_leak(monkeypatch, only):
    """Without the zeros in x and in dy, what lies behind the last group is summed too."""
    right, calls = mosaic_gpu_wgrad._keep_rows, iter(range(10**6))

    def forgetful(*args):
        if next(calls) % 2 == only:
            right(*args)

    monkeypatch.setattr(mosaic_gpu_wgrad, "_keep_rows", forgetful)
    x, w, counts, dy = case("edges within a piece")
    found = interpret(mosaic_gpu_wgrad.wgrad, x, dy, counts, config=SMALL)
    assert not close(found, exact(x, w, counts, dy)[2])


SCHEDULES = [configs.choose(65536, 768, 128), configs.choose(64, 4096, 8), Config(128, 128)]


@pytest.mark.parametrize(
    "config", [SCHEDULES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in SCHEDULES[1:])]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ["product", "gradient of rows", "gradient of matrices"])
def test_every_schedule_lowers_for_the_chip(kernel, dtype, config):
    M, K, N, G = 1000, 1024, 2240, 16
    shape = jax.ShapeDtypeStruct
    x, counts = shape((M, K), dtype), shape((G,), jnp.int32)
    if kernel == "gradient of matrices":
        run = functools.partial(mosaic_gpu_wgrad.wgrad, config=config)
        arrays = x, shape((M, N), dtype), counts
    else:
        transpose = kernel == "gradient of rows"
        run = functools.partial(product, config=config, transpose_w=transpose)
        arrays = x, shape((G, N, K) if transpose else (G, K, N), dtype), counts
    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert config.shared_memory <= SHARED_MEMORY - 1024  # barriers need some
