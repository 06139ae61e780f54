"""What a training step sends: every collective of a strategy, counted from its definition.

Letters as in `footprint`: t tokens of a part, A parts, w bytes a number; counts are those of the
programs of this layer with rematerialisation (without it a layer's forward collectives come once).

    fsdp   a layer gathered forward and again backward, its gradient scattered; tables once
    tp     all-gather 6, reduce-scatter 5 of [t, D] a layer, two of each at the tables
    cp     ring: keys and values of n-1 neighbours, forward, again, and backward with gradients;
           usp: of n/u-1, and all-to-alls of queries, keys, values and outputs among u
    ep     padded: six all-to-alls of the queues [E, C, D] a layer; ragged: of the chosen rows
           [t k, D], where all experts get as many; ring: tokens, what they chose and results
    pp     two messages of [t, D] / tp a tick
    dp     gradients once a step, float32, over cp and ep as well where parameters are whole along
           them; ZeRO scatters them and gathers parameters
"""

from __future__ import annotations

import dataclasses
import math

from parallel.census import Collective
from parallel.footprint import Shares, Step, multiplied, pipelined, shares
from parallel.layout import Layout
from parallel.mesh import Axis


@dataclasses.dataclass(frozen=True)
class Message:
    """A collective of a step and the axis along which it goes."""

    axis: Axis
    what: str
    collective: Collective


def traffic(layout: Layout, step: Step) -> list[Message]:
    """Every collective of a step that grows with the model or the batch."""
    config, s = layout.config, shares(layout, step)
    here = config.num_layers // s[Axis.PP]
    passes = here * step.accumulate
    w, t, tp = step.width, s.tokens, s[Axis.TP]
    again = 2 if step.remat else 1
    found: list[Message] = []

    def add(axis: Axis, what: str, op: str, times: int, size: int, group: int = 0) -> None:
        if (n := s[axis]) > 1 and times:
            result = size // n if op == "reduce-scatter" else size
            group = group or (2 if op == "collective-permute" else n)
            found.append(Message(axis, what, Collective(op, 0, times, result, group)))

    forwards = again + (1 if s[Axis.PP] > 1 else 0)  # a pipeline's backward begins with a forward
    add(Axis.FSDP, "layers", "all-gather", forwards * passes, w * s.layer)
    add(Axis.FSDP, "gradients", "reduce-scatter", passes, w * s.layer)
    tables = 1 if config.tie_embeddings else 2
    add(Axis.FSDP, "tables", "all-gather", tables * step.accumulate, w * s.table)
    add(Axis.FSDP, "tables' gradients", "reduce-scatter", tables * step.accumulate, w * s.table)
    whole = w * t * config.d_model
    gathers, scatters = (6, 5) if step.remat else (4, 4)
    add(Axis.TP, "activations", "all-gather", gathers * passes, whole)
    add(Axis.TP, "activations", "reduce-scatter", scatters * passes, whole)
    for op in ("all-gather", "reduce-scatter"):  # after the embedding and before the head, and back
        add(Axis.TP, "activations of tables", op, 2 * step.accumulate, whole)
    _context(add, layout, step, s, passes)
    if config.experts:
        _experts(add, layout, step, s, passes)
    if s[Axis.PP] > 1:
        ticks = pipelined(step.schedule, s[Axis.PP], step.accumulate).ticks
        add(Axis.PP, "activations", "collective-permute", 2 * ticks, whole // tp)
    _gradients(add, layout, step, s)
    return found


def _experts(add, layout: Layout, step: Step, s: Shares, passes: int) -> None:
    config, n, again = layout.config, s[Axis.EP], 2 if step.remat else 1
    assert config.experts is not None
    row = step.width * config.d_model
    if step.dispatch == "ring":
        k = config.experts.top_k
        add(Axis.EP, "tokens", "all-gather", (again + 1) * passes, n * s.tokens * row)
        add(Axis.EP, "results", "reduce-scatter", 2 * passes, n * s.tokens * row)
        add(Axis.EP, "choices", "all-gather", again * passes, n * s.tokens * 8 * k)
        add(Axis.EP, "choices", "reduce-scatter", passes, n * s.tokens * 4 * k)
        return
    op = "all-to-all" if step.dispatch == "padded" else "ragged-all-to-all"
    rows = multiplied(config, step.dispatch, s.tokens)
    add(Axis.EP, "tokens", op, 2 * (again + 1) * passes, rows * row)


def _context(add, layout: Layout, step: Step, s: Shares, passes: int) -> None:
    config, n = layout.config, s[Axis.CP]
    again = 2 if step.remat else 1
    keys = step.width * s.tokens * 2 * config.num_kv_heads * config.head_dim // s[Axis.TP]
    if step.context == "gather":
        add(Axis.CP, "keys", "all-gather", again * passes, n * keys)
        add(Axis.CP, "keys' gradients", "reduce-scatter", passes, n * keys)
        return
    heads = config.num_kv_heads // s[Axis.TP]
    u = {"ring": 1, "ulysses": n, "usp": math.gcd(heads, n)}[step.context]
    add(Axis.CP, "keys", "collective-permute", (again + 1) * (n // u - 1) * passes, keys)
    rows = 2 * step.width * s.tokens * config.num_heads * config.head_dim // s[Axis.TP]
    if u > 1:
        add(Axis.CP, "heads", "all-to-all", (again + 1) * passes, keys + rows, u)


def _gradients(add, layout: Layout, step: Step, s: Shares) -> None:
    """Each gradient is summed once, over all axes at once along which its parameter is whole."""
    layers = 4 * s.layers
    of_experts = 4 * _of_experts(layout, s)
    kinds = (
        ("gradients", layers - of_experts, (Axis.DP, Axis.EP, Axis.CP)),
        ("experts' gradients", of_experts, (Axis.DP, Axis.CP)),
        ("tables' gradients", 4 * s.tables, (Axis.PP, Axis.DP, Axis.EP, Axis.CP)),
    )
    for what, size, axes in kinds:
        if step.zero:
            add(Axis.DP, "parameters", "all-gather", 1, size)
        if step.zero == 2:
            add(Axis.DP, what, "reduce-scatter", 1, size)
            size, axes = size // s[Axis.DP], tuple(a for a in axes if a != Axis.DP)
        over = [axis for axis in axes if s[axis] > 1]
        if over and size:
            add(over[0], what, "all-reduce", 1, size, math.prod(s[axis] for axis in over))


def _of_experts(layout: Layout, s: Shares) -> int:
    """Parameters of a device that belong to experts."""
    config = layout.config
    if not config.experts:
        return 0
    here = config.num_layers // s[Axis.PP]
    cut = s[Axis.EP] * s[Axis.FSDP] * s[Axis.TP]
    return here * 3 * config.experts.num_experts * config.d_model * config.experts.d_ff // cut


def sent(messages: list[Message]) -> dict[Axis, int]:
    """Bytes that a device sends in a step, by axis."""
    return {
        axis: sum(m.collective.sent for m in messages if m.axis == axis)
        for axis in Axis
        if any(m.axis == axis for m in messages)
    }
