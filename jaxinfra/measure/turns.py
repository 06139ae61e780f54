"""Device seconds of any number of contestants that take turns in one run."""

from __future__ import annotations

import time as _time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxinfra.measure.clock import warm_up
from jaxinfra.measure.device_time import device_seconds


def device_turns(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int = 4, calls: int = 5
) -> tuple[dict[str, list[float]], str]:
    """Seconds of each contestant's calls, `rounds` turns of `calls`, and the clock that gave them.

    All are warmed up first; who begins alternates, and the first call of a turn, which finds the
    caches as another left them, is left out. On a CPU the seconds are those of the wall.
    """
    for call in contestants.values():
        warm_up(call, jax.block_until_ready)
    names, method = list(contestants), ""
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            seconds, method = _turn(contestants[name], calls + 1)
            found[name] += seconds[1:]
    return found, method


def _turn(call: Callable[[], Any], calls: int) -> tuple[list[float], str]:
    seconds, method = device_seconds(
        call, lambda: (), calls, jax.block_until_ready, _time.perf_counter
    )
    if seconds:
        return list(seconds), method
    wall = []
    for _ in range(calls):
        begun = _time.perf_counter()
        jax.block_until_ready(call())
        wall.append(_time.perf_counter() - begun)
    return wall, "wall"
