"""Seconds: of compiling, stage by stage, and of running, warm and waited for.

jax returns before the device is done, so a clock that does not wait times the dispatch alone; and
the first calls compile, so a clock that starts with them times the compiler. `time` waits for every
output and does not start before a call has compiled nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time as _time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxinfra.measure.device_time import device_seconds

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
_WARM_CALLS = 10  # after so many calls that compile each time, something is wrong


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds of repeated calls of one thing."""

    wall: tuple[float, ...]  # from the call until all its outputs were there
    dispatch: tuple[float, ...]  # from the call until it returned, nothing else queued
    device: tuple[float, ...] = ()  # of the device, from calls of their own; empty on a CPU
    device_method: str = "not asked for"  # which clock gave `device`

    @property
    def median(self) -> float:
        """The median wall time."""
        return float(np.median(self.wall))

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartile of the wall times."""
        low, high = np.quantile(self.wall, (0.25, 0.75))
        return float(low), float(high)

    @property
    def p90(self) -> float:
        """The wall time that nine calls in ten keep to."""
        return float(np.quantile(self.wall, 0.9))

    @property
    def device_median(self) -> float | None:
        """The median device time; None where there is none."""
        return float(np.median(self.device)) if self.device else None


@dataclasses.dataclass(frozen=True)
class Stages:
    """What compiling one function took, in seconds, and the program."""

    trace: float
    lower: float
    compile: float
    compiled: Any  # jax.stages.Compiled


def stages(function: Callable, *args: Any, **options: Any) -> Stages:
    """Traces, lowers and compiles `function` for `args`, each timed, all of them cold.

    Arguments may be `jax.ShapeDtypeStruct`s. A plain function is jitted anew, and `options` go to
    `jax.jit`. A jitted one keeps its own options and loses its cache: its next call compiles. The
    persistent cache is left out. What stays warm: jitted functions that `function` calls.
    """
    if hasattr(function, "trace") and hasattr(function, "clear_cache"):
        if options:
            raise ValueError(f"stages: {', '.join(options)} given for a function jitted already")
        fresh: Any = function
        fresh.clear_cache()
    else:
        fresh = jax.jit(lambda *a: function(*a), **options)
    with _no_persistent_cache():
        begun = _time.perf_counter()
        traced = fresh.trace(*args)
        was_traced = _time.perf_counter()
        lowered = traced.lower()
        was_lowered = _time.perf_counter()
        compiled = lowered.compile()
        done = _time.perf_counter()
    return Stages(was_traced - begun, was_lowered - was_traced, done - was_lowered, compiled)


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """jax reads the switch once a process, hence the resets (they delete no file)."""
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


class _Count(threading.local):
    compiles = 0


_count = _Count()


@functools.cache
def _listen() -> None:
    def on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _BACKEND_COMPILE:
            _count.compiles += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)


@contextlib.contextmanager
def compiles() -> Iterator[Callable[[], int]]:
    """Counts programs that this thread compiles, or reads from the persistent cache, in the block.

    `with compiles() as count: ...; count()`; the count stands still after the block. Making an
    array compiles too (`jnp.ones`): build inputs before.
    """
    _listen()
    start, end = _count.compiles, None
    try:
        yield lambda: (_count.compiles if end is None else end) - start
    finally:
        end = _count.compiles


def time(
    function: Callable[..., Any],
    *args: Any,
    inputs: Iterable[tuple] | None = None,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
    device: bool = True,
    sync: Callable[[Any], Any] = jax.block_until_ready,
    clock: Callable[[], float] = _time.perf_counter,
) -> Sample:
    """Times `function(*args)` for about `seconds`, from `least` to `most` calls.

    Args:
      inputs: tuples of arguments instead. A sequence is taken in turn, so that no call finds the
        last one's data in a cache; a generator is drawn from for each call, outside the clock, for
        functions that donate or change their arguments.
      device: where the device is no CPU, its own seconds as well, from further calls that take
        about `seconds` again (none where `seconds` is 0).
      sync: waits for a result; for another framework give its own (a device synchronise), and call
        the function until that framework has compiled: only jax's compiles are seen here.
      clock: seconds that only rise; tests give their own.

    Calls are made without a clock until one compiles nothing, and once more. Raises RuntimeError
    where every call compiles, ValueError where `inputs` ends.
    """
    sets = [args] if inputs is None else inputs
    fixed = len(jax.block_until_ready(sets)) if isinstance(sets, Sequence) else 0
    turns = itertools.cycle(sets) if fixed else iter(sets)

    def draw() -> tuple:
        try:
            return next(turns) if fixed else jax.block_until_ready(next(turns))
        except StopIteration:
            raise ValueError(
                "time: inputs ended; give a sequence or an endless generator"
            ) from None

    warm_up(lambda: function(*draw()), sync, fixed or 1)
    wall, dispatch = [], []
    while len(wall) < least or (sum(wall) < seconds and len(wall) < most):
        arguments = draw()
        begun = clock()
        result = function(*arguments)
        returned = clock()
        sync(result)
        wall.append(clock() - begun)
        dispatch.append(returned - begun)
        del result, arguments  # memory for the next call
    if not device or seconds <= 0:
        return Sample(tuple(wall), tuple(dispatch))
    found, method = device_seconds(function, draw, len(wall), sync, clock)
    return Sample(tuple(wall), tuple(dispatch), found, method)


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
