"""One system from synchronous to asynchronous: equal, bounded, replayed to the bit, unharmed."""

import dataclasses
import functools
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from align.checkpoint import RunCheckpoints
from align.host_loop import HostLoop, JitRollouts
from align.rewards import FunctionReward
from align.step import create
from align.system import Event, Live, Replay, Schedule, System, SystemConfig
from align.system.schedule import finished, read
from tests.align.tiny import (
    CONFIGS,
    MODEL,
    PROBLEMS,
    STEPS,
    difference,
    equal_bits,
    params,
)  # fmt: skip

CONFIG = CONFIGS["grpo"]


def short(samples):
    return [1.0 - 0.3 * len(s.answer) for s in samples]


@functools.cache
def loop(chunk=None):
    rollouts = JitRollouts(CONFIG, MODEL, chunk=chunk)
    return HostLoop(
        CONFIG, MODEL, PROBLEMS, [FunctionReward(short)], steps=STEPS, rollouts=rollouts
    )


def state(seed=0):
    return create(CONFIG, params(), seed=seed, steps=STEPS)


def live(how, steps=STEPS, start=None, ahead=False, **options):
    """A run; `ahead`: after each step, the workers begin all that they may before the next."""
    system = System(loop(how.chunk or None), how, start or state(), **options)
    rows = []
    with Live(system) as running:
        for _ in range(steps):
            rows.append(running.step()[0])
            assert not ahead or comes(lambda: not system.may_begin())
    return system, rows


def comes(what):
    """Whether it is so within two minutes."""
    return any(what() or time.sleep(0.01) for _ in range(12_000))


def again(system, events, steps=STEPS, **options):
    """The run of `events` from its start."""
    twin = System(system.loop, system.how, state(), **options)
    replay = Replay(twin, events)
    for _ in range(steps):
        replay.step()
    return twin


@functools.cache
def host():
    """All steps of the host's loop."""
    s = state()
    for _ in range(STEPS):
        s, _ = loop().step(s)
    return s


def test_without_staleness_it_is_the_hosts_loop():
    system, rows = live(SystemConfig())
    assert difference(system.state.trained, host().trained) < 1e-5
    assert [row["staleness/max"] for row in rows] == [0.0] * STEPS
    kinds = [event.kind for event in system.schedule.events]
    assert kinds[: 4 * STEPS] == ["begin", "finish", "train", "publish"] * STEPS


def test_one_step_off_policy_learns_from_the_policy_before():
    system, rows = live(SystemConfig(max_staleness=1), ahead=True)
    assert rows[0]["staleness/max"] == 0.0 and {r["staleness/max"] for r in rows[2:]} == {1.0}
    assert rows[-1]["mismatch_kl"] > 1e-7  # it is of another policy, and told
    assert difference(system.state.trained, host().trained) > 1e-5
    twin = again(system, system.schedule.events)
    assert equal_bits(twin.state, system.state)


def test_an_asynchronous_run_replays_to_the_bit(tmp_path):
    """Two workers, weights that change within answers; the schedule goes through its file."""
    how = SystemConfig(max_staleness=2, workers=2, chunk=2)
    system, rows = live(how, folder=tmp_path)
    assert max(row["staleness/max"] for row in rows) <= 2
    assert all(np.isfinite(row["loss"]) for row in rows)
    events = read(tmp_path / "schedule.jsonl")
    assert events == system.schedule.events and len(events) > 4 * STEPS
    twin = again(system, events)
    assert equal_bits(twin.state, system.state)
    assert twin.schedule.events == events[: len(twin.schedule.events)]
    wrong = [e for e in events if e.kind != "advance"]
    with pytest.raises(ValueError, match="is not done"):
        again(system, wrong)


@pytest.mark.slow
def test_an_interrupted_asynchronous_run_goes_on_and_replays(tmp_path):
    """From a checkpoint, prompts under way are drawn again; the whole schedule still replays."""
    how = SystemConfig(max_staleness=2, workers=2)
    system, _ = live(how, 3, folder=tmp_path / "run")
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", {"run": 1})
    saved = system.saved()
    assert checkpoints.save(system.state, saved)
    began = {e.batch for e in system.schedule.events if e.kind == "begin"}
    for _ in range(3):  # what happens after the checkpoint is lost
        system.schedule.add(Event("advance", 0))
    state_again, arrays = checkpoints.restore(state())
    checkpoints.close()
    assert equal_bits(state_again, system.state)
    resumed = System(loop(), how, state_again, folder=tmp_path / "run", saved=arrays)
    with Live(resumed) as running:
        for _ in range(STEPS - 3):
            running.step()
    events = read(tmp_path / "run" / "schedule.jsonl")
    drawn = [e.batch for e in events if e.kind == "finish"]
    assert len(set(drawn)) == len(drawn)  # none is used twice
    begun = {e.batch for e in events if e.kind == "begin"}
    assert began <= begun == set(range(len(begun)))  # none is skipped
    for lost in [i for i, e in enumerate(events) if e.kind == "abandon"]:
        after = [e.batch for e in events[lost + 1 :] if e.kind == "begin"]
        assert events[lost].batch in after or events[lost].batch in resumed.returned
    assert equal_bits(again(system, events).state, resumed.state)


def test_work_under_way_goes_into_a_checkpoint():
    """Replay to the middle, with batches half drawn; restore; go on to the same bits."""
    how = SystemConfig(max_staleness=2, chunk=2)
    events = []
    for number in (0, 1, 2):
        events.append(Event("begin", number))
    zero = np.zeros((16, 1), np.float32)
    zero[::3] = 1.0
    events += [Event("advance", 0)] * 2 + [Event("advance", 1), finished(0, zero)]
    events += [Event("train"), Event("publish"), Event("advance", 1), Event("advance", 2)]
    events += [finished(1, zero[::-1])]
    events += [Event("train"), Event("publish")]
    whole = System(loop(2), how, state())
    replay = Replay(whole, events)
    replay.step()
    middle, arrays = whole.state, whole.saved()
    assert [b.work is not None for b in whole.running.values()] == [True, True]
    replay.step()
    resumed = System(loop(2), how, middle, saved=arrays)
    Replay(resumed, events).step()
    assert equal_bits(resumed.state, whole.state)
    ours, theirs = resumed.saved(), whole.saved()
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[k], theirs[k]) for k in ours if k != "about")
    with pytest.raises(ValueError, match="ends here"):
        replay.step()
    with pytest.raises(ValueError, match="another run's"):
        Replay(System(loop(2), how, state()), [Event("begin", 3)]).step()


class Clumsy(JitRollouts):
    """Fails at chosen calls: raises, or hangs until another worker has begun in its place."""

    calls, now = 0, 0.0

    def begin(self, problems, seed, number):
        Clumsy.calls += 1
        if Clumsy.calls in (2, 3):
            raise RuntimeError("a worker is killed")
        if Clumsy.calls == 5:
            Clumsy.now += 2.0
            assert comes(lambda: Clumsy.calls > 5)
        return super().begin(problems, seed, number)


@pytest.fixture
def clumsy(monkeypatch):
    """Makes such workers; time stands still but where one hangs."""
    Clumsy.calls, Clumsy.now = 0, 0.0
    clock = SimpleNamespace(monotonic=lambda: Clumsy.now, perf_counter=time.perf_counter)
    monkeypatch.setattr("align.system.live.time", clock)
    monkeypatch.setattr("align.system.core.time", clock)
    one = loop().rollouts

    def make():
        found = Clumsy.__new__(Clumsy)
        found.__dict__ |= one.__dict__
        return found

    return make


def test_workers_that_crash_or_hang_lose_nothing(clumsy):
    """Batches are given back and drawn again: the synchronous run ends where it would anyway."""
    system, rows = live(SystemConfig(straggler=1.0), make_rollouts=clumsy)
    assert rows[-1]["system/crashed"] == 2 and rows[-1]["system/late"] == 1
    assert difference(system.state.trained, host().trained) < 1e-5
    assert Clumsy.calls >= STEPS + 3


def test_a_batch_that_always_fails_ends_the_run_with_its_error(clumsy):
    with pytest.raises(RuntimeError, match="a worker is killed"):
        live(SystemConfig(failures=2), make_rollouts=clumsy)


def test_threads_end_with_the_run():
    before = threading.active_count()
    live(SystemConfig(max_staleness=1, workers=2), 1)
    assert threading.active_count() <= before


@pytest.mark.parametrize("order", ["replay", "prioritised"])
def test_experience_is_used_again(order):
    system, rows = live(SystemConfig(max_staleness=3, order=order))
    assert max(row["staleness/max"] for row in rows) <= 3
    assert len(system.buffer) > 0 and all(np.isfinite(row["loss"]) for row in rows)
    assert equal_bits(again(system, system.schedule.events).state, system.state)


def test_a_full_disk_costs_the_record_and_not_the_run(tmp_path, monkeypatch, caplog):
    import shutil

    checkpoints = RunCheckpoints(tmp_path / "c", {})
    assert checkpoints.save(state())
    with monkeypatch.context() as patch:
        full = type("usage", (), {"free": 0})
        patch.setattr(shutil, "disk_usage", lambda path: full)
        assert not checkpoints.save(host())
    assert checkpoints.failed == 1 and "the run goes on" in caplog.text
    assert int(checkpoints.restore(state())[0].step) == 0
    checkpoints.close()
    schedule = Schedule(tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").unlink()
    (tmp_path / "s.jsonl").symlink_to("/dev/full")
    schedule.add(Event("train"))
    assert schedule.lost == 1 and schedule.events == [Event("train")]


def test_schedules_survive_a_last_line_that_was_cut_off(tmp_path):
    schedule = Schedule(tmp_path / "s.jsonl")
    rewards = np.asarray([[0.1], [np.nan], [3.0]], np.float32)
    schedule.add(finished(4, rewards))
    with open(tmp_path / "s.jsonl", "a") as file:
        file.write('{"kind": "tra')
    (event,) = read(tmp_path / "s.jsonl")
    assert np.array_equal(np.asarray(event.rewards, np.float32), rewards, equal_nan=True)
    (tmp_path / "s.jsonl").write_text('{"kind": "dance"}\n{"kind": "train"}\n')
    with pytest.raises(ValueError, match="line 1: no event 'dance'"):
        read(tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match="not whole"):
        Schedule(tmp_path / "none.jsonl", keep=3)


def test_old_answers_need_a_correction():
    plain = dataclasses.replace(CONFIG, importance=None)
    with pytest.raises(ValueError, match="importance=sequence_truncate"):
        SystemConfig(max_staleness=1).check(plain)
    SystemConfig().check(plain)
    with pytest.raises(ValueError, match="workers=0"):
        SystemConfig(workers=0)
    with pytest.raises(ValueError, match="JitRollouts with that chunk"):
        System(loop(), SystemConfig(chunk=2), state()).make_rollouts()
    jax.block_until_ready(host().step)
