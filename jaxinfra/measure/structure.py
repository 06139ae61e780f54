"""What a compiled program is made of: exact numbers that do not depend on the machine's mood."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a compiled program; `aliased` are outputs that live in donated arguments."""

    arguments: int
    outputs: int
    temporary: int
    aliased: int


def memory(compiled: Any) -> Memory:
    """The memory that a `jax.stages.Compiled` asks for."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )


def flops(compiled: Any) -> float:
    """XLA's own count of a program's FLOPs; the body of a loop counts once."""
    return float(compiled.cost_analysis()["flops"])


def collectives(compiled: Any) -> dict[str, int]:
    """How often each collective stands in the program's text; a loop's body counts once."""
    return dict(collections.Counter(_COLLECTIVE.findall(compiled.as_text())))
