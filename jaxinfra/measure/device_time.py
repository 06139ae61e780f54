"""Seconds that the device worked, by the best clock that answers, with that clock's name.

On one GPU CUPTI reports every kernel, and a call's time is the sum over its kernels: gaps between
them and copies are not in it, and kernels that overlap count twice. Where CUPTI is missing, is held
by another profiler, or reports what does not divide into calls, calls are queued in batches and
waited for once a batch, so that the dispatch hides behind the device where the device is slower. A
CPU has no such clock: its wall time is its device time.
"""

from __future__ import annotations

import collections
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

CUPTI = "CUPTI, sum of a call's kernels"
NONE = "none: on a CPU the wall time says it"
_BATCHES = 5
_MOST = 20  # calls of one session or batch: the inputs of all of them are there before it


def device_seconds(
    function: Callable[..., Any],
    draw: Callable[[], tuple],
    calls: int,
    sync: Callable[[Any], Any],
    clock: Callable[[], float],
) -> tuple[tuple[float, ...], str]:
    """Device seconds of each of about `calls` calls, and the method that found them.

    `draw` gives the arguments of a call. Empty on a CPU. An exception of CUPTI only changes the
    method, which then names it.
    """
    platform = jax.default_backend()
    if platform == "cpu":
        return (), NONE
    reason = f"no kernel clock for {platform}"
    if platform in ("gpu", "cuda"):
        try:
            return _cupti(function, [draw() for _ in range(min(calls, _MOST))], sync), CUPTI
        except Exception as error:  # a broken profiler must not cost the measurement
            reason = f"CUPTI: {(str(error) or repr(error)).splitlines()[0]}"
    size = max(1, min(calls // _BATCHES, _MOST))
    seconds = []
    for _ in range(_BATCHES):
        arguments, result = [draw() for _ in range(size)], None
        begun = clock()
        for these in arguments:
            result = function(*these)
        sync(result)
        seconds.append((clock() - begun) / size)
    return tuple(seconds), f"wall of {size} calls queued at once ({reason})"


def _extension() -> Any:
    """Mosaic GPU's binding of CUPTI: no public name takes a callable that it does not jit."""
    profiler: Any = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
    return profiler.mosaic_gpu_lib._mosaic_gpu_ext


def _cupti(
    function: Callable[..., Any], arguments: Sequence[tuple], sync: Callable[[Any], Any]
) -> tuple[float, ...]:
    extension = _extension()
    calls, used = len(arguments), set()
    extension._cupti_init()
    try:
        for these in arguments:
            result = function(*these)
            sync(result)
            for leaf in jax.tree.leaves(result):
                if isinstance(leaf, jax.Array):
                    used |= leaf.devices()
    finally:
        kernels = extension._cupti_get_timings(True)  # [(name, milliseconds)], in order
    if len(used) > 1:
        raise RuntimeError(f"the kernels of {len(used)} devices are not told apart")
    if not kernels or len(kernels) % calls:
        raise RuntimeError(f"{len(kernels or ())} kernels in {calls} calls")
    each = len(kernels) // calls
    chunks = [kernels[i : i + each] for i in range(0, len(kernels), each)]
    if any(_names(chunk) != _names(chunks[0]) for chunk in chunks):
        raise RuntimeError("the calls ran different kernels")
    return tuple(sum(milliseconds for _, milliseconds in chunk) / 1e3 for chunk in chunks)


def _names(kernels: list[tuple[str, float]]) -> collections.Counter[str]:
    return collections.Counter(name for name, _ in kernels)
