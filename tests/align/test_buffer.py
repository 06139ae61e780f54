"""The buffer against a plain list by random operations, its draws without bias, its bits kept."""

import itertools
import os

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from align.buffer import Buffer


def item(value: float) -> dict[str, np.ndarray]:
    return {"x": np.full((2, 3), value, np.float32), "n": np.asarray(int(value), np.int32)}


def filled(order, count=6, **options):
    buffer = Buffer(10_000, order, **options)
    for i in range(count):
        buffer.add(item(i), tokens=10, version=i, priority=1.0 + i)
    return buffer


class AgainstAList(RuleBasedStateMachine):
    """A FIFO buffer that spills, against (number, tokens, version, value) in a list."""

    @initialize(capacity=st.integers(20, 60), memory=st.integers(0, 40),
                max_age=st.one_of(st.none(), st.integers(0, 3)))  # fmt: skip
    def begin(self, capacity, memory, max_age):
        import tempfile

        self.scratch = tempfile.TemporaryDirectory()
        self.how = {"max_age": max_age, "memory": memory, "folder": self.scratch.name}
        self.buffer = Buffer(capacity, **self.how)
        self.model, self.version, self.added = [], 0, 0

    @rule(tokens=st.integers(0, 20), behind=st.integers(0, 2))
    def add(self, tokens, behind):
        version = max(0, self.version - behind)
        number = self.buffer.add(item(self.added), tokens=tokens, version=version)
        assert number == self.added
        self.model.append((number, tokens, version))
        self.added += 1
        while sum(tokens for _, tokens, _ in self.model) > self.buffer.capacity:
            self.model.pop(0)

    @rule()
    def publish(self):
        self.version += 1

    @rule(n=st.integers(1, 4))
    def draw(self, n):
        if self.buffer.max_age is not None:
            self.model = [m for m in self.model if self.version - m[2] <= self.buffer.max_age]
        assert self.buffer.ready(n, self.version) == (len(self.model) >= n)
        if len(self.model) < n:
            with pytest.raises(ValueError, match="add more"):
                self.buffer.draw(n, self.version)
            return
        drawn, weights = self.buffer.draw(n, self.version)
        assert [i.number for i in drawn] == [m[0] for m in self.model[:n]]
        assert all(np.array_equal(i.arrays["x"], item(i.number)["x"]) for i in drawn)
        assert np.array_equal(weights, np.ones(n))
        self.model = self.model[n:]

    @rule()
    def checkpoint(self):
        state = self.buffer.state()
        self.buffer = Buffer(self.buffer.capacity, **self.how).restored(state)
        assert self.buffer.state() == state

    @precondition(lambda self: hasattr(self, "buffer"))
    @invariant()
    def same(self):
        assert self.buffer.numbers() == [m[0] for m in self.model]
        assert self.buffer.tokens == sum(m[1] for m in self.model) <= self.buffer.capacity
        held = [i for i in self.buffer._items.values() if i.arrays is not None]
        assert sum(i.tokens for i in held) <= self.buffer.memory
        files = {int(name.removesuffix(".npz")) for name in os.listdir(self.scratch.name)}
        assert files >= {n for n in self.buffer.numbers()} - {i.number for i in held}

    def teardown(self):
        if hasattr(self, "scratch"):
            self.scratch.cleanup()


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(alpha=st.floats(0, 2), priorities=st.lists(st.floats(0.1, 10), min_size=2, max_size=8))
@settings(max_examples=40, deadline=None)
def test_weights_make_the_mean_exact_in_expectation(alpha, priorities):
    """sum_i p_i w_i x_i is the buffer's mean, whatever the priorities: computed, not sampled."""
    buffer = Buffer(1000, "prioritised", alpha=alpha)
    for i, priority in enumerate(priorities):
        buffer.add(item(i), tokens=1, version=0, priority=priority)
    p = buffer._probabilities(list(buffer._items.values()))
    drawn, weights = buffer.draw(64, 0)
    by_item = {i.number: w for i, w in zip(drawn, weights, strict=True)}
    for number, w in by_item.items():
        assert p[number] * w == pytest.approx(1 / len(priorities), rel=1e-5)


def test_prioritised_draws_follow_their_probabilities():
    buffer = filled("prioritised", alpha=1.0)
    drawn, weights = buffer.draw(20_000, 0)
    counts = np.bincount([i.number for i in drawn], minlength=6) / 20_000
    np.testing.assert_allclose(counts, np.arange(1, 7) / 21, atol=0.015)
    values = np.asarray([i.arrays["x"][0, 0] for i in drawn])
    assert np.mean(weights * values) == pytest.approx(2.5, abs=0.06)
    assert abs(np.mean(values) - 2.5) > 0.5  # without weights it is another number
    assert len(buffer) == 6
    buffer.reprioritise(0, 1000.0)
    buffer.reprioritise(77, 1.0)  # has gone: nothing
    assert np.mean([i.number == 0 for i in buffer.draw(1000, 0)[0]]) > 0.9


def test_replay_draws_every_pair_as_often():
    buffer = filled("replay", 4)
    pairs = [tuple(sorted(i.number for i in buffer.draw(2, 3)[0])) for _ in range(6000)]
    for pair in itertools.combinations(range(4), 2):
        assert pairs.count(pair) / 6000 == pytest.approx(1 / 6, abs=0.025)


def test_replay_forgets_what_is_too_old():
    buffer = filled("replay", 6, max_age=2)
    assert {i.number for _ in range(40) for i in buffer.draw(2, 5)[0]} == {3, 4, 5}
    assert buffer.counts["too_old"] == 3
    assert not buffer.ready(3, 6)


@pytest.mark.parametrize("order", ["fifo", "replay", "prioritised"])
def test_a_restored_buffer_draws_the_same(order, tmp_path):
    buffer = filled(order)
    buffer.draw(2, 5)
    twin = Buffer(10_000, order, memory=0, folder=tmp_path).restored(buffer.state())
    for _ in range(2):
        ours, theirs = buffer.draw(2, 5), twin.draw(2, 5)
        assert [i.number for i in ours[0]] == [i.number for i in theirs[0]]
        assert np.array_equal(ours[1], theirs[1])
        for a, b in zip(ours[0], theirs[0], strict=True):
            assert all(a.arrays[k].tobytes() == b.arrays[k].tobytes() for k in ("x", "n"))
            assert a.arrays["n"].dtype == b.arrays["n"].dtype
    assert buffer.state() == twin.state()


def test_a_full_disk_keeps_the_item_in_memory(tmp_path, monkeypatch, caplog):
    buffer = Buffer(100, memory=10, folder=tmp_path)
    buffer.add(item(0), tokens=10, version=0)

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        buffer.add(item(1), tokens=10, version=0)
    buffer.add(item(2), tokens=10, version=0)
    assert buffer.counts["not_spilled"] == 1 and "the disk is full" in caplog.text
    assert os.listdir(tmp_path) == ["2.npz"]
    drawn, _ = buffer.draw(3, 0)
    assert [int(i.arrays["n"]) for i in drawn] == [0, 1, 2] and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: Buffer(1, "lifo"), "choose one of fifo"), (lambda: Buffer(0), "at least one token"),
     (lambda: Buffer(9, memory=3), "come together"),
     (lambda: Buffer(9).add({}, tokens=10, version=0), "capacity of 9"),
     (lambda: Buffer(9).add({}, tokens=1, version=0, priority=0.0), "positive number"),
     (lambda: Buffer(9).restored(Buffer(8).state()), "capacity was 8, now 9")],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
