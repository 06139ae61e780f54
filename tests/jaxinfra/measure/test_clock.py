"""The classic mistakes of timing, each shown to go wrong, and the project's clock to go right."""

import itertools
import time as real_time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.measure import compiles, stages, time

SLEEP = 0.02


class Laptop:
    """A fake clock and the work that moves it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


class Device(Laptop):
    """Its clock, and a device that takes SLEEP seconds for a call, which returns at once."""

    def call(self, *_):
        self.work(SLEEP / 100)
        return self.now + SLEEP

    def wait(self, done_at):
        self.now = max(self.now, done_at)


def nothing(_):
    """Waits for nothing."""


def slow_to_compile(x):
    for i in range(150):
        x = jnp.sin(x) * (i + 1.0)
    return x


def test_timing_the_dispatch():
    device = Device()
    mistaken = time(device.call, sync=nothing, seconds=0, least=20, clock=device).median
    sample = time(device.call, sync=device.wait, seconds=0.1, clock=device)
    assert mistaken < SLEEP / 10  # nothing was waited for
    assert sample.median >= SLEEP > 10 * np.median(sample.dispatch)


class Late:
    """An array that is there SLEEP seconds after it was asked for."""

    def __init__(self, device):
        self.device, self.done = device, device.call()

    def block_until_ready(self):
        self.device.wait(self.done)


def test_every_output_is_waited_for():
    device = Device()
    made = lambda: {"early": 0.0, "late": [Late(device)]}  # noqa: E731
    assert time(made, seconds=0.1, clock=device).median >= SLEEP


def test_inputs_on_their_way_are_waited_for_before_the_clock():
    device = Device()
    inputs = ((Late(device),) for _ in itertools.count())

    def use(x):
        x.block_until_ready()

    options = {"seconds": 0, "sync": nothing, "clock": device}
    mistaken = time(lambda: use(Late(device)), **options)  # makes its input when timed
    assert time(use, inputs=inputs, **options).median < SLEEP / 2 < SLEEP <= mistaken.median


def test_counting_the_compile():
    x = jnp.ones(8)
    first = jax.jit(slow_to_compile)
    clock = real_time.process_time  # what others compute does not count
    begun = clock()
    jax.block_until_ready(first(x))
    mistaken = clock() - begun
    assert time(jax.jit(slow_to_compile), x, seconds=0.05, clock=clock).median < mistaken / 10


def test_warm_up_lasts_until_compiles_stop():
    arrays = {n: jnp.ones(n) for n in range(3, 8)}

    def growing():
        shapes = itertools.chain([3, 4, 5, 6], itertools.repeat(7))
        f = jax.jit(lambda x: x * 2)
        return lambda: f(arrays[next(shapes)])

    mistaken = growing()
    for _ in range(2):  # a fixed warm-up of two
        mistaken()
    with compiles() as count:
        mistaken()
    assert count() == 1

    timed = 0

    def clock():
        nonlocal timed
        timed += 1
        return real_time.perf_counter()

    right = growing()
    with compiles() as count:
        time(lambda: (right(), timed)[0], seconds=0, least=5, clock=clock)
    assert count() == 5 and timed == 15  # all five before the clock was first looked at
    with compiles() as count:
        time(right, seconds=0, least=5)
    assert count() == 0
    with pytest.raises(RuntimeError, match="compiled"):
        time(lambda: jax.jit(lambda x: x + 1)(arrays[3]))


def test_every_set_of_inputs_is_warm():
    f, sets = jax.jit(lambda x: x * 3), [(jnp.ones(n),) for n in (3, 4, 5)]
    with compiles() as count:
        seen = []
        time(f, inputs=sets, seconds=0, clock=lambda: seen.append(count()) or 0.0)
    assert set(seen) == {3}


def test_compiles_are_counted_inside_the_block_only():
    f, x, y = jax.jit(lambda x: x + 1), jnp.ones(3), jnp.ones(5)
    with compiles() as outer:
        f(x)
        with compiles() as inner:
            f(x)
        assert inner() == 0 and outer() == 1
    f(y)
    assert inner() == 0 and outer() == 1


def test_dead_code_is_removed():
    def work(x):
        for _ in range(3):
            x = jnp.tanh(x @ x)
        return x

    def products(function, *args):
        return stages(function, *args).compiled.as_text().count(" dot(")

    x = jnp.ones((64, 64))
    assert products(lambda x: (work(x), 1.0)[1], x) == 0  # the mistake: not returned
    assert products(work, x) == 3
    # A gradient that nobody asks for is not computed: three backward products are missing.
    assert products(lambda x: jax.value_and_grad(lambda y: work(y).sum())(x)[0], x) == 3
    assert products(lambda x: jax.value_and_grad(lambda y: work(y).sum())(x), x) == 9


def test_a_constant_input_is_folded_away():
    def chain(x):
        return jnp.sin(x) + jnp.cos(x) * jnp.exp(x)

    x = jnp.ones(64)
    assert "exponential" not in stages(lambda: chain(jnp.ones(64))).compiled.as_text()
    assert "exponential" in stages(chain, x).compiled.as_text()


def test_the_same_input_each_time_finds_its_result_in_a_cache():
    laptop = Laptop()

    def remembering(seen):
        def call(key):
            laptop.work(0.001 if key in seen else 1.0)
            seen[:] = [*seen, key][-3:]  # a cache of three

        return call

    options = {"sync": nothing, "clock": laptop, "least": 12, "most": 12}
    assert time(remembering([]), 0, **options).median < 0.1  # the mistake
    assert time(remembering([]), inputs=[(i,) for i in range(3)], **options).median < 0.1
    assert time(remembering([]), inputs=[(i,) for i in range(4)], **options).median == 1.0


def test_inputs_take_turns():
    calls = []
    time(calls.append, inputs=[(1,), (2,), (3,)], sync=nothing, least=6, most=6)
    assert all(b == a % 3 + 1 for a, b in itertools.pairwise(calls))


def test_an_input_that_the_function_changes():
    laptop = Laptop()

    def sort(values):  # already sorted is ten times less work
        laptop.work(0.1 if values == sorted(values) else 1.0)
        values.sort()

    def fresh():
        while True:
            laptop.work(50.0)  # making an input is not timed
            yield ([3, 1, 2],)

    options = {"sync": nothing, "clock": laptop, "least": 5, "most": 5}
    assert time(sort, [3, 1, 2], **options).median == pytest.approx(0.1)  # the mistake
    assert time(sort, inputs=fresh(), **options).median == pytest.approx(1.0)
    with pytest.raises(ValueError, match="inputs ended"):
        time(sort, inputs=iter([([3, 1, 2],)]), **options)
    with pytest.raises(ValueError, match="inputs ended"):
        time(sort, inputs=[], **options)


def test_a_donated_input_is_gone():
    f = jax.jit(lambda x: x + 1, donate_argnums=0)
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        time(f, jnp.ones(8), seconds=0)
    fresh = ((jnp.full(8, float(i)),) for i in itertools.count())
    assert len(time(f, inputs=fresh, seconds=0, least=7).wall) == 7


def test_one_sample_is_not_trusted():
    laptop = Laptop()
    paces = itertools.chain([0.0, 0.0, 10.0], itertools.repeat(1.0))  # warm-up, then a hiccup
    options = {"sync": nothing, "clock": laptop, "seconds": 0}
    single = time(lambda: laptop.work(next(paces)), least=1, most=1, **options)
    assert single.median == 10.0 and single.spread == (10.0, 10.0)  # wrong and sure of it
    paces = itertools.chain([0.0, 0.0, 10.0], itertools.repeat(1.0))
    sample = time(lambda: laptop.work(next(paces)), **options)
    assert sample.median == 1.0 and len(sample.wall) == 5
    assert max(sample.wall) == 10.0 and sample.p90 > 5  # kept and shown


def test_stages_are_cold(tmp_path):
    """A persistent cache and a jitted function's own would make compiling look cheap."""
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes")  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    x, events = jnp.ones(8), []
    jax.monitoring.register_event_listener(note := lambda event, **_: events.append(event))

    def again():
        jitted.clear_cache()
        return jitted.trace(x).lower().compile()

    def read(action):
        events.clear()
        action()
        return "/jax/compilation_cache/cache_hits" in events

    try:
        for name, value in zip(names, (str(tmp_path), 0.0, -1), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jitted = jax.jit(lambda x: slow_to_compile(x))  # jits of one function share a cache
        jitted(x)
        assert read(again)  # the mistake: from the disk, not compiled
        found = []
        assert not read(lambda: found.append(stages(jitted, x)))
        begun = real_time.process_time()
        jitted.trace(x)
        mistaken = real_time.process_time() - begun  # traced before
        assert mistaken < found[0].trace / 5
        assert read(again)  # the cache is on again
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.monitoring.unregister_event_listener(note)


def test_stages_keep_the_options_of_a_jitted_function():
    x = jnp.ones((32, 32))
    donating = jax.jit(lambda x: x + 1, donate_argnums=0)
    assert stages(donating, x).compiled.memory_analysis().alias_size_in_bytes == x.nbytes
    with pytest.raises(ValueError, match="jitted already"):
        stages(donating, x, donate_argnums=0)
