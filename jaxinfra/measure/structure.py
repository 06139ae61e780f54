"""What a compiled program is made of: exact numbers that do not depend on the machine's mood."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a compiled program; `aliased` are outputs that live in donated arguments."""

    arguments: int
    outputs: int
    temporary: int
    aliased: int
    peak: int  # what XLA counts as alive at once, arguments included


@dataclasses.dataclass(frozen=True)
class Cost:
    """XLA's own counts of one run of a program; the body of a loop counts once."""

    flops: float
    bytes: float  # that its operations read and write
    transcendentals: float


def memory(compiled: Any) -> Memory:
    """The memory that a `jax.stages.Compiled` asks for, on each device."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
        found.peak_memory_in_bytes,
    )


def cost(compiled: Any) -> Cost:
    """The work of a `jax.stages.Compiled` as XLA counts it; 0 for what it does not name."""
    found = compiled.cost_analysis()
    keys = ("flops", "bytes accessed", "transcendentals")
    return Cost(*(float(found.get(key, 0)) for key in keys))


def flops(compiled: Any) -> float:
    """`cost(compiled).flops`."""
    return cost(compiled).flops


def collectives(compiled: Any) -> dict[str, int]:
    """How often each collective stands in the program's text; a loop's body counts once."""
    return dict(collections.Counter(_COLLECTIVE.findall(compiled.as_text())))
