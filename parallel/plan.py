"""Which mesh, for a model, a chip and a batch: memory, traffic and time of every product of axes.

For each split of the chips into dp, fsdp, tp, cp, pp and ep, and each way to attend over cp, to
dispatch to experts and to keep or compute activations again, the planner counts memory
(`footprint`), messages (`traffic`) and idle time (`pipeline.simulate`), drops what does not fit,
with the reason, and ranks the rest by predicted time:

    compute    model FLOPs, 4/3 of them with rematerialisation, over ATTAINED of the chip's peak;
               padded queues of experts are multiplied whole, E / k times what tokens chose
    inner      tp, ep, cp (gather, ulysses, usp) and pp messages are waited for
    outer      fsdp, dp and ring messages run under the compute; what is longer than it is added
    step       (compute + inner) / (1 - bubble) + max(0, outer - compute)

(Austin et al. 2025, "How to Scale Your Model", chapters 5 and 6.) A prediction of time is a
roofline, good for ranking; `--verify` holds memory and messages to the compiled program.

    python -m jaxinfra plan llama-3.1-70b --chip v5p --count 256 --tokens 4M
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxinfra.errors import UserError
from jaxinfra.hardware.chips import Chip
from jaxinfra.hardware.roofline import peak
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.counts import train_flops_per_token
from parallel.experts import DISPATCH
from parallel.footprint import (
    Step,
    abstract_layout,
    footprint,
    largest,
    multiplied,
    pipelined,
    total,
)
from parallel.mesh import Axis, describe
from parallel.traffic import Message, sent, traffic

ATTAINED = 0.7  # of the peak, by large matrix products in a real step; calibrate by measuring
HEADROOM = 0.95  # of a chip's memory that a step may take
NODE = 8  # GPUs that share the fast link


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a mesh would cost; times in seconds a step, bytes on one device."""

    sizes: dict[Axis, int]
    step: Step
    memory: dict[str, int]
    messages: list[Message]
    sent: dict[Axis, int]
    links: dict[Axis, str]
    communication: dict[Axis, float]
    compute: float
    bubble: float
    seconds: float
    mfu: float

    @property
    def mesh(self) -> str:
        """As `jaxinfra train --mesh` takes it."""
        return describe(self.sizes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The meshes that fit, fastest first, and why the others do not."""

    fitting: list[Prediction]
    rejected: dict[str, str]  # mesh -> reason


def plan(config: ModelConfig, chip: Chip, count: int, tokens: int, seq_len: int) -> Plan:
    """Every product of axes over `count` chips, for steps of `tokens` tokens in rows of `seq_len`.

    Raises UserError where the batch is no whole number of rows.
    """
    if count < 1 or count & (count - 1):
        raise UserError(f"plan: count={count}: give a power of two")
    if seq_len > config.max_seq_len:
        raise UserError(f"plan: seq_len={seq_len} exceeds max_seq_len={config.max_seq_len}")
    if tokens < seq_len:
        raise UserError(f"plan: tokens={tokens} are less than one row of {seq_len}; give more")
    if chip.memory_bytes is None or not chip.links:
        raise UserError(f"plan: {chip.name} has no links in the table; choose another chip")
    rows = tokens // seq_len
    fitting: list[Prediction] = []
    rejected: dict[str, str] = {}
    for sizes in _meshes(config, count):
        found = _best(config, chip, count, rows, seq_len, sizes)
        if isinstance(found, str):
            rejected[describe(sizes)] = found
        else:
            fitting.append(found)
    order = lambda p: (p.seconds, sum(p.communication.values()))  # noqa: E731
    return Plan(sorted(fitting, key=order), rejected)


def _meshes(config: ModelConfig, count: int) -> Iterator[dict[Axis, int]]:
    """All splits of `count` into powers of two; ep only for models with experts."""
    axes = [a for a in Axis if a != Axis.EP or config.experts]

    def split(left: int, axes: list[Axis]) -> Iterator[dict[Axis, int]]:
        if len(axes) == 1:
            yield {axes[0]: left}
            return
        size = 1
        while size <= left:
            for rest in split(left // size, axes[1:]):
                yield {axes[0]: size, **rest}
            size *= 2

    yield from split(count, axes)


def _best(
    config: ModelConfig, chip: Chip, count: int, rows: int, seq_len: int, sizes: dict[Axis, int]
) -> Prediction | str:
    """The fastest of the numbers of parts that fit; the reason where none does."""
    try:
        layout = abstract_layout(config, sizes)
    except UserError as error:
        return str(error)
    of = lambda axis: sizes.get(axis, 1)  # noqa: E731
    pp, cp, tp = of(Axis.PP), of(Axis.CP), of(Axis.TP)
    replicas = of(Axis.DP) * of(Axis.FSDP) * of(Axis.EP)
    if rows % replicas:
        return f"batch: {rows} rows are no multiple of dp * fsdp * ep = {replicas}"
    if seq_len % math.lcm(tp * cp, 2 * cp if cp > 1 else 1):
        return f"batch: {seq_len} positions are no multiple of tp * cp = {tp * cp}"
    if pp > 1 and config.experts and config.experts.balance_coef:
        return "schedule: experts' balance loss is not computed under pp"
    most = rows // replicas
    found: Prediction | str = f"schedule: {most} rows a replica are fewer than 2 pp microbatches"
    for ways in _ways(config, chip, sizes):
        accumulate = 2 * pp if pp > 1 else 1
        before = math.inf
        while accumulate <= min(most, 64 * pp):
            if most % accumulate == 0:
                step = Step(rows, seq_len, accumulate, zero=2 if of(Axis.DP) > 1 else 0, **ways)
                memory = footprint(layout, step)
                room = HEADROOM * (chip.memory_bytes or 0)
                if total(memory) > room:
                    if isinstance(found, str):
                        found = (
                            f"memory: {total(memory) / 1e9:.0f} GB of {room / 1e9:.0f}, the "
                            f"largest part {largest(memory)} "
                            f"({memory[largest(memory)] / 1e9:.0f} GB)"
                        )
                else:
                    here = predict(config, chip, count, sizes, step)
                    if isinstance(found, str) or here.seconds < found.seconds:
                        found = here
                    if here.seconds > before:
                        break  # more parts only send more
                    before = here.seconds
            accumulate *= 2
    return found


def _ways(config: ModelConfig, chip: Chip, sizes: dict[Axis, int]) -> Iterator[dict[str, Any]]:
    """What else a step can choose on a mesh, what takes most memory first.

    A pipeline computes its stages again in any case and takes no ring. On a TPU all is computed
    again: what a step without that needs was held to a GPU's program alone.
    """
    of = lambda axis: sizes.get(axis, 1)  # noqa: E731
    cp, tp, pp = of(Axis.CP), of(Axis.TP), of(Axis.PP)
    contexts = ["ring", "usp"] if pp == 1 else ["gather"]
    if pp > 1 and config.num_kv_heads % (tp * cp) == 0:
        contexts.append("ulysses")
    keeps = pp == 1 and not _is_torus(chip)
    for remat in (False, True) if keeps else (True,):
        for context in contexts if cp > 1 else contexts[:1]:
            for dispatch in DISPATCH if config.experts else DISPATCH[:1]:
                yield {"remat": remat, "context": context, "dispatch": dispatch}


def predict(
    config: ModelConfig, chip: Chip, count: int, sizes: dict[Axis, int], step: Step
) -> Prediction:
    """What `step` costs on a mesh, whether it fits or not."""
    layout = abstract_layout(config, sizes)
    memory, messages = footprint(layout, step), traffic(layout, step)
    by_axis = sent(messages)
    links = {axis: _link(chip, sizes, axis) for axis in by_axis}
    seconds = {axis: by_axis[axis] / links[axis][1] for axis in by_axis}
    rate = peak(chip, "bfloat16")
    model_flops = train_flops_per_token(config, step.seq_len) * step.rows * step.seq_len
    flops = model_flops
    if config.experts:
        t = step.rows * step.seq_len
        rows = multiplied(config, step.dispatch, t) - t * config.experts.top_k
        flops += 18 * rows * config.d_model * config.experts.d_ff * config.num_layers
    compute = flops * (4 / 3 if step.remat else 1) / (count * ATTAINED * rate)
    under = {Axis.DP, Axis.FSDP} | ({Axis.CP} if step.context == "ring" else set())
    inner = sum(t for axis, t in seconds.items() if axis not in under)
    outer = sum(t for axis, t in seconds.items() if axis in under)
    pp = sizes.get(Axis.PP, 1)
    bubble = pipelined(step.schedule, pp, step.accumulate).bubble if pp > 1 else 0.0
    whole = (compute + inner) / (1 - bubble) + max(0.0, outer - compute)
    return Prediction(
        sizes, step, memory, messages, by_axis,
        {axis: name for axis, (name, _) in links.items()}, seconds, compute, bubble, whole,
        model_flops / (whole * count * rate),
    )  # fmt: skip


def _link(chip: Chip, sizes: dict[Axis, int], axis: Axis) -> tuple[str, float]:
    """The link along which an axis sends, and bytes/s out of a device.

    On a TPU an axis has one dimension of the torus, both ways round; on GPUs the fast link as long
    as the axis and those inside it fit a node, and the host's beyond.
    """
    fast = chip.links[0]
    if _is_torus(chip):
        return fast.name, fast.bandwidth / (fast.count / 2)
    inside = math.prod(sizes.get(a, 1) for a in list(Axis)[list(Axis).index(axis) :])
    link = fast if inside <= NODE or len(chip.links) == 1 else chip.links[1]
    return link.name, link.bandwidth


def _is_torus(chip: Chip) -> bool:
    return "torus" in chip.links[0].name


def reasons(rejected: dict[str, str]) -> list[tuple[int, str, str]]:
    """(how many, the kind of reason, an example with its mesh), most frequent first."""
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for mesh, reason in rejected.items():
        by_kind[reason.split(":")[0]].append(f"{mesh}: {reason}")
    return sorted(((len(all_), kind, all_[0]) for kind, all_ in by_kind.items()), reverse=True)
