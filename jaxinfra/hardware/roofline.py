"""Rooflines: where each operation of a model stands under a chip's roof, and what that allows.

attainable FLOP/s = min(peak, bandwidth x intensity), intensity in FLOPs a byte (Williams,
Waterman and Patterson, CACM 52(4), 2009). An operation's time is at least the larger of its FLOPs
over the peak and its bytes over the bandwidth; a phase's time is the sum over its operations, as
if each overlapped computing and loading perfectly and none overlapped another. Where a working set
fits into on-chip memory, as a small model's does into a CPU's cache, less is loaded than counted.

    python -m jaxinfra roofline qwen3-0.6b --chip H200
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxinfra.errors import UserError
from jaxinfra.hardware import chips
from jaxinfra.hardware.ceilings import Ceilings
from jaxinfra.hardware.chips import Chip
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.counts import (
    PHASES,
    Operation,
    itemsize,
    kv_bytes_per_token,
    num_params,
    operations,
)


@dataclasses.dataclass(frozen=True)
class Roof:
    """A flat roof of `flops` FLOP/s and a slope of `bandwidth` bytes/s."""

    name: str
    flops: float
    bandwidth: float
    vector_flops: float  # roof of elementwise work, which matrix units do not do


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation under the roof; `measured` is under the ceilings of this machine."""

    operation: Operation
    bound: str  # "compute" or "memory"
    seconds: float
    share: float  # of the phase's seconds
    measured: float | None  # seconds


@dataclasses.dataclass(frozen=True)
class Phase:
    """The operations of one phase and what their times add up to."""

    name: str
    rows: tuple[Row, ...]
    tokens: int  # computed in one pass or step: new tokens of all sequences
    seconds: float
    measured: float | None
    memory_bytes: int  # weights and cache, or weights, gradients and optimizer state

    @property
    def tokens_per_second(self) -> float:
        """The bound under the chip's roof."""
        return self.tokens / self.seconds

    @property
    def measured_tokens_per_second(self) -> float | None:
        """The bound under this machine's ceilings."""
        return None if self.measured is None else self.tokens / self.measured


@dataclasses.dataclass(frozen=True)
class RooflineReport:
    """What `report` found; `render_table` and `plot` show it."""

    model: str
    chip: Chip
    dtype: str
    batch: int
    seq_len: int
    phases: tuple[Phase, ...]
    roof: Roof
    ceiling: Roof | None  # measured on this machine, where it has the chip asked for


def attainable(chip: Chip, intensity: float, dtype: str) -> float:
    """FLOP/s that `chip` allows at `intensity` FLOPs a byte."""
    return min(peak(chip, dtype), chip.bandwidth * intensity)


def ridge(chip: Chip, dtype: str) -> float:
    """FLOPs a byte from which on `chip` is bound by computing."""
    return peak(chip, dtype) / chip.bandwidth


def time_bound(operation: Operation, chip: Chip, dtype: str) -> float:
    """Seconds that `operation` takes at least."""
    return _seconds(operation, _roof(chip, dtype))


def peak(chip: Chip, dtype: str) -> float:
    """Dense FLOP/s of matrix products; a UserError where the chip has none or nobody says."""
    rate = chip.flops.get(dtype)
    if rate is None:
        known = ", ".join(name for name, value in chip.flops.items() if value)
        why = "takes no" if dtype not in chip.flops else "has no published rate for"
        raise UserError(f"{chip.name} {why} {dtype} in its matrix units; choose one of {known}")
    return rate


def default_dtype(chip: Chip) -> str:
    """The dtype one computes in on `chip`: float32 on CPUs, else bfloat16, else float16."""
    choices = ("float32",) if "cpu" in chip.kinds else ("bfloat16", "float16", "float32")
    return next(dtype for dtype in choices if chip.flops.get(dtype))


def report(
    config: ModelConfig,
    chip: Chip,
    *,
    model: str = "",
    phases: Sequence[str] = PHASES,
    batch: int = 1,
    seq_len: int = 2048,
    dtype: str | None = None,
    measured: Ceilings | None = None,
) -> RooflineReport:
    """Every operation of `config` under the roof of `chip`.

    Args:
      model: its name, for titles.
      phases: of "prefill", "decode" and "train".
      batch, seq_len: sequences, and tokens of each; decode computes the last token of each.
      dtype: of weights, activations and cache; `default_dtype(chip)` if None.
      measured: ceilings of this machine, shown beside the chip's.
    """
    dtype = dtype or default_dtype(chip)
    roof = _roof(chip, dtype)
    ceiling = None
    if measured and dtype in measured.flops:
        vector = min(roof.vector_flops, measured.flops[dtype])
        ceiling = Roof("measured here", measured.flops[dtype], measured.bandwidth, vector)
    return RooflineReport(
        model or config.family, chip, dtype, batch, seq_len,
        tuple(_phase(config, name, batch, seq_len, dtype, roof, ceiling) for name in phases),
        roof, ceiling,
    )  # fmt: skip


def for_model(
    model: str,
    chip: str = "here",
    *,
    phases: Sequence[str] = PHASES,
    batch: int = 1,
    seq_len: int = 2048,
    dtype: str | None = None,
) -> RooflineReport:
    """`report` of a preset, config.json, folder or .gguf file on a chip by name, or on this one.

    Where this machine has that chip, its ceilings are measured too, in about three seconds.
    """
    from jaxinfra.hardware import detect
    from jaxinfra.model import presets

    config = presets.find(model)
    this = detect.lookup()
    target = detect.detect() if chip == "here" else chips.find(chip)
    measured = None
    if this and this.kinds == target.kinds:
        target, measured = this, detect.here()
    return report(config, target, model=model, phases=phases, batch=batch, seq_len=seq_len,
                  dtype=dtype, measured=measured)  # fmt: skip


def _roof(chip: Chip, dtype: str) -> Roof:
    measured = chip.sources["flops"].startswith("measured here")
    name = "measured here" if measured else f"{chip.name} on paper"
    matrix = peak(chip, dtype)
    return Roof(name, matrix, chip.bandwidth, chip.flops.get("float32") or matrix)


def _seconds(operation: Operation, roof: Roof) -> float:
    flops = roof.vector_flops if operation.kind == "elementwise" else roof.flops
    return max(operation.flops / flops, operation.bytes / roof.bandwidth)


def _phase(
    config: ModelConfig, name: str, batch: int, seq_len: int, dtype: str, roof: Roof,
    ceiling: Roof | None,
) -> Phase:  # fmt: skip
    found = operations(config, phase=name, batch=batch, seq_len=seq_len, dtype=dtype)
    seconds = [_seconds(op, roof) for op in found]
    total = math.fsum(seconds)
    measured = [_seconds(op, ceiling) if ceiling else None for op in found]
    rows = tuple(
        Row(op, "memory" if op.bytes / roof.bandwidth >= s else "compute", s, s / total, m)
        for op, s, m in zip(found, seconds, measured, strict=True)
    )
    weights, cache = num_params(config), batch * seq_len * kv_bytes_per_token(config, dtype)
    return Phase(
        name=name,
        rows=rows,
        tokens=batch * (1 if name == "decode" else seq_len),
        seconds=total,
        measured=math.fsum(m for m in measured if m is not None) if ceiling else None,
        memory_bytes=16 * weights if name == "train" else round(weights * itemsize(dtype)) + cache,
    )
