"""A drift falls on both contestants, and the interval of their ratio is as wide as it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.measure import Comparison, Sample, compare, compiles, time
from jaxinfra.measure.compare import ratio_interval


def nothing(_):
    """Waits for nothing."""


class Drift:
    """A clock on a machine that slows down: each call takes 1 % longer than the last."""

    def __init__(self):
        self.now, self.pace = 0.0, 1.0

    def work(self, seconds):
        self.pace *= 1.01
        self.now += seconds * self.pace

    def __call__(self):
        return self.now

    def timed(self):
        begun = self.now
        self.work(1.0)
        return self.now - begun


def sample(wall) -> Sample:
    return Sample(tuple(wall), tuple(wall))


def test_one_after_the_other_takes_a_drift_for_a_difference():
    drift = Drift()
    options = {"sync": nothing, "clock": drift, "least": 40, "most": 40}
    one = time(lambda: drift.work(1.0), **options)
    other = time(lambda: drift.work(1.0), **options)
    assert other.median / one.median > 1.3


def test_in_turns_but_always_in_the_same_order_still_favours_the_first():
    drift = Drift()
    pairs = [(drift.timed(), drift.timed()) for _ in range(40)]
    first, second = zip(*pairs, strict=True)
    mistaken = Comparison(("a", "b"), (sample(first), sample(second)))
    assert mistaken.interval[0] > 1.005 and "a is 1.01x the speed of b" in mistaken.verdict()


def test_alternating_order_cancels_a_drift():
    drift = Drift()
    pair = compare(
        {"a": lambda: drift.work(1.0), "b": lambda: drift.work(1.0)},
        rounds=40, clock=drift, sync={"a": nothing, "b": nothing},
    )  # fmt: skip
    assert abs(pair.ratio - 1) < 0.01 and "cannot be told apart" in pair.verdict()


def test_the_order_alternates():
    calls = []
    compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=6)
    assert "".join(calls[-12:]) == "abba" * 3


def test_a_real_difference_is_found():
    now = [0.0]
    rng = np.random.default_rng(0)

    def work(seconds):
        now[0] += seconds * rng.uniform(0.8, 1.2)

    pair = compare(
        {"fast": lambda: work(1.0), "slow": lambda: work(2.0)},
        clock=lambda: now[0], sync={"fast": nothing, "slow": nothing},
    )  # fmt: skip
    low, high = pair.interval
    assert 1.6 < low < pair.ratio < high < 2.4
    assert (
        pair.verdict() == f"fast is {pair.ratio:.2f}x the speed of slow (95 % {low:.2f}-{high:.2f})"
    )


def test_a_batch_hides_the_dispatch():
    now, done = [0.0], [0.0]

    def call():  # 9 to dispatch, 10 on the device, which works through a queue
        now[0] += 9
        done[0] = max(done[0], now[0]) + 10
        return done[0]

    def wait(done_at):
        now[0] = max(now[0], done_at)

    waits = {"a": wait, "b": wait}
    options = {"clock": lambda: now[0], "sync": waits, "rounds": 5}
    assert compare({"a": call, "b": call}, **options).samples[0].median == 19
    assert compare({"a": call, "b": call}, batch=90, **options).samples[0].median == 10.1


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = narrow = 0
    for _ in range(200):
        shared = rng.uniform(1, 2, 15)  # what both meet in a round
        first, second = shared * rng.normal(1.0, 0.1, 15), 2 * shared * rng.normal(1.0, 0.1, 15)
        low, high = ratio_interval(first, second)
        covered += low <= 2 <= high
        narrow += abs(np.median(second) / np.median(first) - 2) < 1e-2  # a bare ratio, as if exact
    assert covered > 175 and narrow < 50


def test_the_interval_is_a_function_of_the_samples():
    first, second = np.random.default_rng(0).uniform(1, 2, (2, 15))
    assert ratio_interval(first, second) == ratio_interval(first, second)


def test_outliers_widen_the_interval():
    low, high = ratio_interval((1.0, 1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0, 2.0))
    assert low == high == 2
    first, second = (1.0, 1.0, 1.0, 9.0, 1.0), (2.0, 2.0, 18.0, 2.0, 2.0)
    low, high = ratio_interval(first, second)
    assert low < 1 or high > 2


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="5 pairs"):
        ratio_interval((1.0,) * 4, (2.0,) * 4)  # it would claim 2.00-2.00
    with pytest.raises(ValueError, match="5 pairs"):
        ratio_interval((1.0,) * 6, (2.0,) * 5)
    with pytest.raises(ValueError, match="two contestants"):
        compare({"alone": lambda: None})
    with pytest.raises(ValueError, match="rounds"):
        compare({"a": lambda: None, "b": lambda: None}, rounds=1)


def test_both_are_warm_before_the_clock():
    fs, x, seen = [jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 2)], jnp.ones(3), []
    with compiles() as count:
        compare(
            {"a": lambda: fs[0](x), "b": lambda: fs[1](x)},
            clock=lambda: seen.append(count()) or float(len(seen)),
        )
    assert set(seen) == {2}


def test_jax_beside_numpy():
    x = jnp.ones((8, 8))
    y = np.ones((8, 8), np.float32)
    f = jax.jit(lambda x: x @ x)
    pair = compare({"jax": lambda: f(x), "numpy": lambda: y @ y}, rounds=5)
    assert all(min(s.dispatch) > 0 and len(s.wall) == 5 for s in pair.samples)
