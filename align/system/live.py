"""Threads that draw answers while the caller learns: synchronous to asynchronous, by one number.

    with Live(system) as live:
        for _ in range(steps):
            metrics, experience = live.step()

A worker that raises gives its batch back, and another begins it anew; one that is silent for
`straggler` seconds is left behind and replaced. A batch that fails `failures` times in a row ends
the run with its error. In one process, workers and trainer share a device's queue: what overlaps is
the host's work (rewards above all), or everything where `JitRollouts.places` are other devices.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from align.host_loop import Rollouts
from align.system.core import Running, System

_LOOK = 0.2  # seconds between looks for stragglers


class Live:
    """See the module; a context manager, so that the threads end."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._changed = threading.Condition(system.lock)
        self._stopped = False
        self._failed: Counter[int] = Counter()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Live:
        for _ in range(self.system.how.workers):
            self._start_worker()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=30.0)

    def step(self) -> tuple[dict[str, float], Any]:
        """Waits for a batch, learns from it and publishes: metrics, and the experience."""
        system, begun = self.system, time.perf_counter()
        with self._changed:
            while not system.ready():
                if self._error is not None:
                    raise self._error
                self._changed.wait(_LOOK)
                self._leave_stragglers()
            items, weights = system.take()
        waited = time.perf_counter() - begun
        state, metrics, priorities, experience = system.learn(items, weights)
        with self._changed:
            system.publish(state, priorities)
            metrics |= system.told()
            self._changed.notify_all()
        times = {"timing_s/wait": waited, "step_time": time.perf_counter() - begun}
        return metrics | times, experience

    def _start_worker(self) -> None:
        thread = threading.Thread(target=self._work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _leave_stragglers(self) -> None:
        now = time.monotonic()
        for batch in list(self.system.running.values()):
            if now - batch.since > self.system.how.straggler:
                self.system.abandon(batch, "late")
                self._start_worker()

    def _work(self) -> None:
        """A worker: batches one after the other, until it is stopped or was left behind."""
        rollouts = self.system.make_rollouts()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self.system.may_begin())
                if self._stopped:
                    return
                batch = self.system.begin()
                rollouts.update_weights(self.system.published, self.system.version)
            try:
                here = self._draw(batch, rollouts)
            except Exception as error:
                here = self._lose(batch, error)
            if not here:
                return

    def _draw(self, batch: Running, rollouts: Rollouts) -> bool:
        """Whether the batch is this worker's to the end."""
        system = self.system
        problems = system.problems_of(batch.number)
        work = rollouts.begin(problems, int(system.state.seed), batch.number)
        while not work.done:
            with self._changed:
                if self._stopped or not system.current(batch):
                    return False
                system.advance(batch)
                rollouts.update_weights(system.published, system.version)
            work = rollouts.advance(work)
        answers = system.answers(rollouts, work, problems)
        rewards, told = system.loop.rewards_of(answers)
        with self._changed:
            if self._stopped or not system.current(batch):
                return False
            system.finish(batch, answers, rewards, told)
            self._failed.pop(batch.number, None)
            self._changed.notify_all()
        return True

    def _lose(self, batch: Running, error: Exception) -> bool:
        with self._changed:
            if not self.system.current(batch):
                return False
            self.system.abandon(batch, "crashed")
            self._failed[batch.number] += 1
            if self._failed[batch.number] >= self.system.how.failures:
                self._error = error
            self._changed.notify_all()
        return True
