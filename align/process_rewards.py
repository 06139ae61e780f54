"""Rewards in other processes: a sample that hangs or kills its process costs that sample alone.

Cost: a process a worker, about 0.4 s to start one (no jax is imported in it), and a pickled sample
and a number a call. POSIX only.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from align import reward_worker
from align.rewards import Answers, Sample

_START = 60.0  # seconds until a new process has to be ready


class ProcessReward:
    """A function of one sample, called in `workers` processes.

    A call of more than `timeout` seconds, or that ends its process (a crash, `os._exit`, too much
    memory), gives nan; the process is replaced. The function is a module's, for it is sent by name.
    """

    def __init__(
        self, function: Callable[[Sample], float | None], *, workers: int = 2,
        timeout: float = 10.0, name: str | None = None,
    ) -> None:  # fmt: skip
        self.function, self.name = function, name or function.__name__
        self.counts: Counter[str] = Counter()
        self.timeout = threading.TIMEOUT_MAX  # of a batch: each sample has its own
        self._each, self._count = timeout, workers
        self._workers: list[_Worker] = []

    def __call__(self, answers: Answers) -> Sequence[float | None]:
        try:
            return self._scores(answers)
        except BaseException:  # what other calls are still computing must not be taken for ours
            self.close()
            raise

    def _scores(self, answers: Answers) -> Sequence[float | None]:
        results: list[Any] = [None] * answers.size
        waiting, busy = deque(range(answers.size)), {}
        self._workers += [_Worker(self.function) for _ in range(self._count - len(self._workers))]
        idle = list(self._workers)
        while waiting or busy:
            while waiting and idle:
                worker, i = idle.pop(), waiting.popleft()
                worker.pipe.send(answers.samples[i])
                busy[worker.pipe] = (worker, i, time.monotonic() + self._each)
            until = min(deadline for *_, deadline in busy.values())
            ready = wait(list(busy), max(0.0, until - time.monotonic()))
            late = [p for p, (*_, d) in busy.items() if p not in ready and d <= time.monotonic()]
            for pipe in [*ready, *late]:
                worker, i, _ = busy.pop(pipe)
                kind, value = ("late", None) if pipe in late else worker.answer()
                if kind == "value":
                    results[i] = value
                else:
                    self.counts[kind] += 1
                if kind in ("late", "crashed"):
                    worker = self._replace(worker)
                idle.append(worker)
        return results

    def _replace(self, worker: _Worker) -> _Worker:
        worker.close()
        new = _Worker(self.function)
        self._workers[self._workers.index(worker)] = new
        return new

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()


class _Worker:
    def __init__(self, function: Callable[[Sample], float | None]) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(reward_worker.__file__)), str(theirs.fileno())],
            pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.pipe.send((function, Sample))
        if not self.pipe.poll(_START) or self.answer()[0] != "ready":
            self.close()
            raise RuntimeError(
                f"a reward's process cannot import {function!r}; see its error above"
            )

    def answer(self) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return "crashed", None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.pipe.close()
