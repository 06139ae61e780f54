"""Rewards from Python, each apart from the run: one that raises, hangs or lies costs its answers.

A `Scorer` gives one number an answer. `score` asks several at once, each in a thread of its own and
with its own time-out, and makes of every failure a nan, which leaves the answer out of the step
(`align.advantages`): it is counted by kind and the run goes on.

| scorer | calls | a hang costs |
| --- | --- | --- |
| FunctionReward | a function of all samples, or a coroutine of one | all; or the late one |
| ProcessReward | a function of one sample in other processes | that one; its process is killed |
| HTTPReward | a server (`align.reward_server`) | all, after `attempts` |
| GraphReward, ModelReward | array programs (`align.array_rewards`) | all |

This module imports no jax.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import json
import math
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxinfra.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer to one problem."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Without the stop token that ended it."""
    stopped: bool
    """Whether it ended by itself."""
    problem: Mapping[str, Any]
    """The row of what else the problems hold, as numpy scalars and arrays."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """A batch of answers [B, ...] with a row of the problems for each, all on the host."""

    rollout: Any
    """`align.rollout.Rollout` of numpy arrays."""
    problems: Mapping[str, np.ndarray]

    @property
    def size(self) -> int:
        """B."""
        return len(self.rollout.lengths)

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """The same, one by one."""
        r = self.rollout
        more = {k: v for k, v in self.problems.items() if k not in ("prompts", "lengths")}
        drawn = (np.sum(r.mask, axis=1) - r.stopped).astype(int)
        return [
            Sample(
                tuple(r.tokens[i, : r.lengths[i]].tolist()),
                tuple(r.answer[i, : drawn[i]].tolist()),
                bool(r.stopped[i]),
                {k: v[i] for k, v in more.items()},
            )
            for i in range(self.size)
        ]


class Scorer(Protocol):
    """Gives each answer a number, or None or nan where there is none.

    `timeout` is in seconds, of the whole batch. What it counts of single answers' failures it adds
    to `counts`, which `score` reads and empties.
    """

    name: str
    timeout: float
    counts: Counter[str]

    def __call__(self, answers: Answers) -> Sequence[float | None] | np.ndarray: ...


class FunctionReward:
    """A Python function of a list of samples that gives as many numbers; or a coroutine of one.

    Coroutines run side by side, and the time-out is each one's own. A function that hangs cannot be
    stopped: its thread stays behind, so one that may hang belongs into a `ProcessReward`.
    """

    def __init__(
        self, function: Callable[..., Any], *, timeout: float = 30.0, name: str | None = None
    ) -> None:
        self.function, self.name = function, name or function.__name__
        self.counts = Counter()
        self._each = timeout
        self.timeout = timeout + 1.0 if inspect.iscoroutinefunction(function) else timeout

    def __call__(self, answers: Answers) -> Sequence[float | None]:
        if not inspect.iscoroutinefunction(self.function):
            return self.function(answers.samples)
        return asyncio.run(self._all(answers.samples))

    async def _all(self, samples: Sequence[Sample]) -> list[float | None]:
        return list(await asyncio.gather(*(self._one(self.function(s)) for s in samples)))

    async def _one(self, work: Awaitable[float | None]) -> float | None:
        try:
            return await asyncio.wait_for(work, self._each)
        except TimeoutError:
            self.counts["late"] += 1
        except Exception:
            self.counts["raised"] += 1
        return None


class HTTPReward:
    """A server that takes {"samples": [...]} and answers {"rewards": [number or null, ...]}.

    A request that fails is made again, `attempts` times in all, after 0.1, 0.2, 0.4 ... seconds.
    """

    def __init__(
        self, url: str, *, timeout: float = 30.0, attempts: int = 3, name: str = "http"
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"rewards: {url!r} is no address; give one as http://HOST:PORT")
        self.url, self.attempts, self.name = url, attempts, name
        self.timeout, self.counts = timeout * attempts + 0.1 * 2**attempts, Counter()
        self._each = timeout

    def __call__(self, answers: Answers) -> Sequence[float | None]:
        body = json.dumps({"samples": [as_json(s) for s in answers.samples]}).encode()
        headers = {"Content-Type": "application/json"}
        for attempt in range(self.attempts):
            try:
                request = urllib.request.Request(self.url, body, headers)
                with urllib.request.urlopen(request, timeout=self._each) as response:
                    return json.load(response)["rewards"]
            except (OSError, ValueError, LookupError, TypeError):
                self.counts["asked_again"] += 1
                if attempt + 1 == self.attempts:
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("no attempt was made")


def as_json(sample: Sample) -> dict[str, Any]:
    """A sample as what JSON can hold; `sample_of` turns it back."""
    problem = {k: np.asarray(v).tolist() for k, v in sample.problem.items()}
    return {**dataclasses.asdict(dataclasses.replace(sample, problem={})), "problem": problem}


def sample_of(data: Mapping[str, Any]) -> Sample:
    """The sample of `as_json`; what were arrays are lists now."""
    return Sample(
        tuple(data["prompt"]), tuple(data["answer"]), bool(data["stopped"]), dict(data["problem"])
    )


def score(scorers: Sequence[Scorer], answers: Answers) -> tuple[np.ndarray, dict[str, float]]:
    """float32 [B, R], nan where a scorer has no number, and metrics of each scorer.

    Metrics: rewards/NAME/mean and /std over the numbers there are (TRL's names), and the answers
    lost to each kind of failure: /raised, /late, /wrong_count, /not_finite, and what the scorer
    counts itself (/crashed, /asked_again), where there were any.
    """
    found: list[Any] = [None] * len(scorers)
    threads = [
        threading.Thread(target=_ask, args=(scorer, answers, found, k), daemon=True)
        for k, scorer in enumerate(scorers)
    ]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    columns, metrics = [], {}
    for k, (scorer, thread) in enumerate(zip(scorers, threads, strict=True)):
        thread.join(max(0.0, begun + scorer.timeout - time.monotonic()))
        values, counts = _column(found[k], answers.size)
        counts += scorer.counts
        scorer.counts.clear()
        there = values[~np.isnan(values)]
        metrics[f"rewards/{scorer.name}/mean"] = float(there.mean()) if len(there) else math.nan
        metrics[f"rewards/{scorer.name}/std"] = float(there.std()) if len(there) else math.nan
        metrics |= {f"rewards/{scorer.name}/{kind}": float(n) for kind, n in counts.items() if n}
        columns.append(values)
    return np.stack(columns, axis=1), metrics


def _ask(scorer: Scorer, answers: Answers, found: list[Any], place: int) -> None:
    try:
        found[place] = scorer(answers)
    except Exception as error:
        found[place] = error


def _column(found: Any, size: int) -> tuple[np.ndarray, Counter[str]]:
    """A scorer's numbers, nan where there is none, and its failures by kind."""
    nothing = np.full(size, np.nan, np.float32)
    if found is None:
        return nothing, Counter(late=size)
    if isinstance(found, Exception):
        return nothing, Counter(raised=size)
    try:
        values = np.asarray([np.nan if v is None else v for v in found], np.float32)
        silent = sum(v is None for v in found)
    except (TypeError, ValueError):
        return nothing, Counter(raised=size)
    if values.shape != (size,):
        return nothing, Counter(wrong_count=size)
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    return values, Counter(not_finite=int(np.isnan(values).sum()) - silent)
