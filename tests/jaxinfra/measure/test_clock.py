"""The classic mistakes of timing, each shown to go wrong, and the project's clock to go right."""

import itertools
import time as real_time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.measure import compare, compiles, stages, time
from jaxinfra.measure.compare import ratio_interval

SLEEP = 0.02


class Device:
    """A device that takes SLEEP seconds for a call, which returns at once; counts executions."""

    def __init__(self):
        self.runs = 0

    def call(self, *_):
        self.runs += 1
        return real_time.perf_counter() + SLEEP

    @staticmethod
    def wait(done_at):
        real_time.sleep(max(done_at - real_time.perf_counter(), 0))


def test_timing_the_dispatch():
    device = Device()
    begun = real_time.perf_counter()
    device.call()
    assert real_time.perf_counter() - begun < SLEEP / 2  # the mistake: nothing was waited for
    sample = time(device.call, sync=device.wait, seconds=0.1)
    assert sample.median >= SLEEP > 2 * np.median(sample.dispatch)


def test_every_output_is_waited_for():
    device = Device()
    sample = time(lambda: {"early": 0.0, "late": device.call()}, seconds=0.1,
                  sync=lambda out: [device.wait(done) for done in out.values()])  # fmt: skip
    assert sample.median >= SLEEP


def test_counting_the_compile():
    def slow_to_compile(x):
        for i in range(150):
            x = jnp.sin(x) * (i + 1.0)
        return x

    x = jnp.ones(8)
    first = jax.jit(slow_to_compile)
    begun = real_time.perf_counter()
    jax.block_until_ready(first(x))
    mistaken = real_time.perf_counter() - begun
    assert time(jax.jit(slow_to_compile), x, seconds=0.05).median < mistaken / 10


def test_warm_up_lasts_until_compiles_stop():
    shapes = itertools.chain([3, 4, 5, 6], itertools.repeat(7))  # a fixed warm-up of two is too few
    f = jax.jit(lambda x: x * 2)
    arrays = {n: jnp.ones(n) for n in range(3, 8)}
    with compiles() as count:
        sample = time(lambda: f(arrays[next(shapes)]), seconds=0.02)
        assert count() == 5
    assert max(sample.wall) < 100 * sample.median
    with pytest.raises(RuntimeError, match="compiled"):
        time(lambda: jax.jit(lambda x: x + 1)(arrays[3]))


def test_dead_code_is_removed():
    def work(x):
        for _ in range(3):
            x = jnp.tanh(x @ x)
        return x

    x = jnp.ones((64, 64))
    unused = stages(lambda x: (work(x), 1.0)[1], x)  # the mistake: the result is not returned
    kept = stages(work, x)
    assert " dot(" not in unused.compiled.as_text()
    assert kept.compiled.as_text().count(" dot(") == 3
    folded = stages(lambda: work(jnp.ones((64, 64))))  # a constant input may be folded away
    assert folded.compiled.as_text().count(" dot(") <= 3


def test_inputs_take_turns_so_that_a_cached_result_shows():
    seen = {}

    def remembering(key):  # the mistake: the same input each time finds its result in a cache
        if key not in seen:
            real_time.sleep(SLEEP)
            seen[key] = key
        return key

    assert time(remembering, 0, sync=lambda _: None, seconds=0.05).median < SLEEP / 10
    fresh = [(i,) for i in range(1, 4)]
    calls = []
    time(lambda key: calls.append(key), inputs=fresh, sync=lambda _: None, least=6, most=6)
    assert calls[-6:] in ([1, 2, 3, 1, 2, 3], [2, 3, 1, 2, 3, 1], [3, 1, 2, 3, 1, 2])


class Drift:
    """A clock on a machine that slows down: each call takes 1 % longer than the last."""

    def __init__(self):
        self.now, self.pace = 0.0, 1.0

    def work(self, seconds):
        self.pace *= 1.01
        self.now += seconds * self.pace

    def __call__(self):
        return self.now


def test_a_drift_falls_on_both():
    drift = Drift()
    options = {"sync": lambda _: None, "clock": drift, "least": 40, "most": 40}
    one = time(lambda: drift.work(1.0), **options)
    other = time(lambda: drift.work(1.0), **options)
    assert other.median / one.median > 1.3  # the mistake: one after the other
    drift = Drift()
    pair = compare(
        {"a": lambda: drift.work(1.0), "b": lambda: drift.work(1.0)},
        rounds=40, clock=drift, sync={"a": lambda _: None, "b": lambda _: None},
    )  # fmt: skip
    assert abs(pair.ratio - 1) < 0.02
    assert "cannot be told apart" in pair.verdict()


def test_a_real_difference_is_found():
    now = [0.0]
    rng = np.random.default_rng(0)

    def work(seconds):
        now[0] += seconds * rng.uniform(0.8, 1.2)

    pair = compare(
        {"fast": lambda: work(1.0), "slow": lambda: work(2.0)},
        clock=lambda: now[0], sync={"fast": lambda _: None, "slow": lambda _: None},
    )  # fmt: skip
    low, high = pair.interval
    assert 1.6 < low < pair.ratio < high < 2.4
    assert pair.interval == pair.interval and "fast is" in pair.verdict()


def test_one_sample_is_not_trusted():
    assert len(time(lambda: None, sync=lambda _: None, seconds=0).wall) >= 5
    low, high = ratio_interval((1.0, 1.0, 1.0, 9.0), (2.0, 2.0, 18.0, 2.0))
    assert low < 1 or high > 2  # outliers widen the interval
    with pytest.raises(ValueError, match="two contestants"):
        compare({"alone": lambda: None})


def test_stages_and_structure():
    from jaxinfra.measure import collectives, flops, memory

    found = stages(lambda x, y: x @ y + x, jnp.ones((32, 32)), jnp.ones((32, 32)), donate_argnums=0)
    assert min(found.trace, found.lower, found.compile) > 0
    assert abs(flops(found.compiled) - 2 * 32**3) < 0.1 * 2 * 32**3
    assert memory(found.compiled).aliased == 32 * 32 * 4
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=split)
    program = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x).compile()
    assert collectives(program) == {"all-reduce": 1}
