"""Hopper kernels on a CPU: interpreted, with a detector that sees unordered accesses to memory.

The interpreter runs every warpgroup, every asynchronous copy and every barrier, and keeps a vector
clock for each; two accesses to one place that no barrier orders are a race. A tensor core's reads
of shared memory are not among the accesses that it sees: `pallas_kernels.mma` shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import _compat

_RACES = (
    "RACE DETECTED",
    "did not observe all phases",
    "completed again before previous completion was observed",
    "but no threads observed phase",
)


# With jax 0.10 it interprets no cluster's barriers and misses stores that are not committed.
WHOLE: bool = _compat.WHOLE_INTERPRETER


class RaceError(Exception):
    """Two accesses to the same memory in no order, or a barrier whose phases were not all seen."""


def interpret(kernel: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`kernel(*args, **options, interpret=...)`, waited for; raises RaceError where it races."""
    try:
        result = kernel(*args, **options, interpret=_compat.interpret_params())
        jax.block_until_ready(result)
        raced = _compat.races_found()
    except Exception as error:
        if not (_compat.races_found() or any(words in str(error) for words in _RACES)):
            raise
        raced = True
    finally:
        _compat.reset_interpreter()
    if raced:
        raise RaceError(f"{kernel.__module__}.{kernel.__qualname__} races; the report stands above")
    return result
