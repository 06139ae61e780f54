"""Seconds: of compiling, stage by stage, and of running, warm and waited for.

jax returns before the device is done, so a clock that does not wait times the dispatch alone; and
the first calls compile, so a clock that starts with them times the compiler. `time` waits for every
output and does not start before a call has compiled nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time as _time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
_WARM_CALLS = 10  # after so many calls that compile each time, something is wrong


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds of repeated calls of one thing."""

    wall: tuple[float, ...]  # from the call until all its outputs were there
    dispatch: tuple[float, ...]  # from the call until it returned

    @property
    def median(self) -> float:
        """The median wall time."""
        return float(np.median(self.wall))

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartile of the wall times."""
        low, high = np.quantile(self.wall, (0.25, 0.75))
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Stages:
    """What compiling one function took, and the program."""

    trace: float
    lower: float
    compile: float
    compiled: Any  # jax.stages.Compiled


def stages(function: Callable, *args: Any, **options: Any) -> Stages:
    """Traces, lowers and compiles `function` for `args`, each timed; `options` go to `jax.jit`.

    Arguments may be `jax.ShapeDtypeStruct`s. No cache of earlier jits is used; the persistent
    cache of compiled programs is, where one is set.
    """
    fresh = jax.jit(lambda *a: function(*a), **options)
    begun = _time.perf_counter()
    traced = fresh.trace(*args)
    was_traced = _time.perf_counter()
    lowered = traced.lower()
    was_lowered = _time.perf_counter()
    compiled = lowered.compile()
    done = _time.perf_counter()
    return Stages(was_traced - begun, was_lowered - was_traced, done - was_lowered, compiled)


class _Count:
    compiles = 0


@functools.cache
def _listen() -> None:
    def on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _BACKEND_COMPILE:
            _Count.compiles += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)


@contextlib.contextmanager
def compiles() -> Iterator[Callable[[], int]]:
    """Counts programs compiled inside the block: `with compiles() as count: ...; count()`."""
    _listen()
    start = _Count.compiles
    yield lambda: _Count.compiles - start


def time(
    function: Callable[..., Any],
    *args: Any,
    inputs: Sequence[tuple] | None = None,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
    sync: Callable[[Any], Any] = jax.block_until_ready,
    clock: Callable[[], float] = _time.perf_counter,
) -> Sample:
    """Times `function(*args)` for about `seconds`, from `least` to `most` calls.

    Args:
      inputs: several tuples of arguments instead, taken in turn, so that no call finds the last
        one's data in a cache.
      sync: waits for a result; for another framework give its own (a device synchronise).
      clock: seconds that only rise; tests give their own.

    Calls are made without a clock until one compiles nothing, and once more. Raises RuntimeError
    where every call compiles.
    """
    turns = list(inputs) if inputs else [args]
    calls = iter(range(10**9))

    def call() -> Any:
        return function(*turns[next(calls) % len(turns)])

    warm_up(call, sync, len(turns))
    wall, dispatch = [], []
    while len(wall) < least or (sum(wall) < seconds and len(wall) < most):
        begun = clock()
        result = call()
        returned = clock()
        sync(result)
        wall.append(clock() - begun)
        dispatch.append(returned - begun)
    return Sample(tuple(wall), tuple(dispatch))


def warm_up(call: Callable[[], Any], sync: Callable[[Any], Any], turns: int = 1) -> None:
    """Calls until `turns` calls in a row compile nothing, and once more."""
    for _ in range(_WARM_CALLS):
        with compiles() as count:
            for _ in range(turns):
                sync(call())
        if count() == 0:
            sync(call())
            return
    raise RuntimeError(
        f"every one of {_WARM_CALLS} calls compiled: its shapes or its static arguments change, "
        "or it makes a new jitted function each time"
    )
