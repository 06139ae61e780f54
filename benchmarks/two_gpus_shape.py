"""What both sides of `benchmarks.two_gpus` run, and how they tell what came out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from jaxinfra.model.config import ModelConfig
from jaxinfra.model.presets import PRESETS

MARK = "RESULT "  # begins a line for the parent


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, rows a GPU, and how often things are measured."""

    config: ModelConfig
    rows: int
    length: int
    warmup: int
    steps: int
    message_bytes: tuple[int, ...]
    most_calls: int

    def tokens(self, rows: int) -> list[np.ndarray]:
        """Three batches of random tokens [rows, length + 1]."""
        rng = np.random.default_rng(0)
        return [
            rng.integers(0, self.config.vocab_size, (rows, self.length + 1), np.int32)
            for _ in range(3)
        ]

    def calls(self, size: int) -> int:
        """Collectives that are queued before waiting: fewer of large ones, which need memory."""
        return max(2, min(self.most_calls, 2**32 // size))


SHAPE = Shape(
    PRESETS["qwen3-1.7b"], rows=4, length=4096, warmup=2, steps=8,
    message_bytes=(2**20, 2**24, 2**28, 2**30), most_calls=50,
)  # fmt: skip
TINY = Shape(
    PRESETS["qwen3-1.7b"].replace(
        vocab_size=512, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16,
        d_ff=128, bos_id=None, eos_ids=(),
    ),
    rows=8, length=64, warmup=1, steps=5, message_bytes=(2**12, 2**20), most_calls=3,
)  # fmt: skip


def told(name: str, result: dict[str, Any]) -> None:
    """One line on standard output."""
    print(MARK + json.dumps({"name": name} | result), flush=True)


def heard(text: str) -> dict[str, dict[str, Any]]:
    """What `told` wrote, by name."""
    lines = [line.partition(MARK)[2] for line in text.splitlines() if MARK in line]
    return {result.pop("name"): result for result in map(json.loads, lines)}
