"""Memory of a training step on one device, item by item, before anything is compiled.

The state is exact: shapes over the axes that cut them. What lives besides is counted at the two
moments at which a step is fullest: in the head, with a block of logits, and in the first layer of
the backward pass, with one layer's activations. How many arrays of a layer live at once was read
off the compiler's buffers for TPU v5p (`jaxinfra plan --verify` compares them again): five of the
feed-forward width, six of the heads', two of the model's.

    letters    t tokens of a part on a device, w bytes a number, P_d parameters of a device
    saved      L t D w / tp      inputs of layers; a pipeline keeps its stash of them
    logits     min(4096, t / 4) V / tp, float32
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from parallel import experts
from parallel.layout import Layout, bytes_on_a_device
from parallel.mesh import Axis
from parallel.pipeline import schedule as pipeline
from parallel.pipeline.simulate import simulate


@dataclasses.dataclass(frozen=True)
class Step:
    """What is trained in a step, and how its parts follow one another."""

    rows: int  # B, of all devices
    seq_len: int  # T
    accumulate: int = 1  # parts, or microbatches of the pipeline
    remat: bool = True
    zero: int = 0
    schedule: str = "eager-1f1b"
    context: str = "ring"
    dispatch: str = "padded"
    width: int = 2  # w


@dataclasses.dataclass(frozen=True)
class Shares:
    """Sizes of axes, parameters and tokens of one device."""

    sizes: dict[str, int]
    layers: int  # parameters of its layers
    tables: int  # of its parts of the embedding and the head
    table: int  # of one of them, gathered over fsdp
    layer: int  # of one layer, gathered over fsdp
    tokens: int  # t

    def __getitem__(self, axis: Axis) -> int:
        return self.sizes.get(axis, 1)


@dataclasses.dataclass(frozen=True)
class Pipelined:
    """What a schedule costs: messages that a stage sends each way, inputs kept, idle share."""

    ticks: int
    stash: int
    bubble: float


@functools.cache
def pipelined(name: str, stages: int, microbatches: int) -> Pipelined:
    """Of a schedule by name, a backward pass taking three forward ones: it begins with one."""
    table = pipeline.make(name, stages, microbatches)
    found = simulate(table, forward=1.0, backward=3.0)
    return Pipelined(len(table.table), max(found.stash), found.lockstep_bubble)


def shares(layout: Layout, step: Step) -> Shares:
    """What one device of the layout holds."""
    config, sizes = layout.config, {str(k): v for k, v in layout.mesh.shape.items()}
    shapes = P.abstract(config, jnp.int8)  # bytes are then numbers
    layers = bytes_on_a_device(shapes.layers, layout.specs.layers, layout.mesh)
    every = bytes_on_a_device(shapes, layout.specs, layout.mesh)
    of = lambda axis: sizes.get(axis, 1)  # noqa: E731
    data = of(Axis.DP) * of(Axis.FSDP) * of(Axis.EP) * of(Axis.CP)
    tokens = step.rows * step.seq_len // (data * step.accumulate)
    here = config.num_layers // of(Axis.PP)
    return Shares(
        sizes, layers, every - layers, config.vocab_size * config.d_model // of(Axis.TP),
        layers * of(Axis.FSDP) // here, tokens,
    )  # fmt: skip


def footprint(layout: Layout, step: Step) -> dict[str, int]:
    """Bytes on one device by item, at the fullest moment."""
    config, s = layout.config, shares(layout, step)
    w, held = step.width, s.layers + s.tables
    moments = held // (s[Axis.DP] if step.zero else 1)
    state = {"parameters": 4 * held, "optimizer": 8 * moments}
    fsdp, tp, pp = s[Axis.FSDP], s[Axis.TP], s[Axis.PP]
    copy = w * held
    saved = config.num_layers // pp * _saved(config, step, s)
    if pp > 1:
        kept = pipelined(step.schedule, pp, step.accumulate).stash
        stash = {"pipeline stash": (kept + 4) * s.tokens * config.d_model * w // tp}
    else:
        stash = {}
    sums = 4 * held if step.accumulate > 1 else 0
    block = min(4096, -(-s.tokens // 4))
    head = {
        "computing copy": copy, "gradients": sums, "saved activations": saved,
        "logits": 4 * block * config.vocab_size // tp,
        "gathered": (w * s.table if fsdp > 1 else 0) + w * s.table,
    }  # fmt: skip
    backward = {
        "computing copy": copy, "gradients": sums or w * s.layers, "saved activations": saved,
        "gathered": w * s.table + (w * s.layer if fsdp > 1 else 0),
        "one layer": _of_a_layer(config, step, s) if step.remat else 0,  # or it is saved
    }  # fmt: skip
    fuller = max(head, backward, key=lambda items: sum(items.values()))
    return state | fuller | stash


def _saved(config: ModelConfig, step: Step, s: Shares) -> int:
    """Bytes that a layer keeps for the backward pass: its input, or all that it computed."""
    if step.remat:
        return s.tokens * config.d_model * step.width // s[Axis.TP]
    return _of_a_layer(config, step, s)


def _of_a_layer(config: ModelConfig, step: Step, s: Shares) -> int:
    """Bytes of the arrays of one layer that live at once in its backward pass."""
    t, tp, w = s.tokens, s[Axis.TP], step.width
    heads = config.num_heads * config.head_dim // tp
    wide = 6 * heads + 2 * config.d_model
    if config.experts is None:
        wide += 5 * config.d_ff // tp
    size = t * w * wide
    if config.experts is not None:
        rows = multiplied(config, step.dispatch, t) if step.dispatch == "padded" else 0
        rows = rows or s[Axis.EP] * t * config.experts.top_k  # room for all that can come
        size += rows * w * (3 * config.d_model + 2 * config.experts.d_ff // tp)
    if (cp := s[Axis.CP]) > 1 and step.context in ("ring", "usp"):
        turns = cp // (math.gcd(config.num_kv_heads // tp, cp) if step.context == "usp" else 1)
        size += 8 * turns * t * heads * 4  # sums of each of its steps, float32
    return size


def multiplied(config: ModelConfig, dispatch: str, tokens: int) -> int:
    """Rows that a device's experts multiply for so many tokens a device, where all are even."""
    assert config.experts is not None
    if dispatch == "padded":
        return config.experts.num_experts * experts.places(tokens, config.experts, None)
    return tokens * config.experts.top_k


def total(items: dict[str, int]) -> int:
    """Bytes of all items."""
    return sum(items.values())


def largest(items: dict[str, int]) -> str:
    """The item with the most bytes."""
    return max(items, key=lambda name: items[name])


def abstract_layout(config: ModelConfig, sizes: dict[Axis, int]) -> Layout:
    """A layout over devices that are not there.

    Raises UserError where a dimension of the model does not divide.
    """
    axes = [axis for axis in Axis if sizes.get(axis, 1) > 1] or [Axis.DP]
    shape = tuple(sizes.get(axis, 1) for axis in axes)
    mesh: Any = jax.sharding.AbstractMesh(shape, tuple(map(str, axes)))
    assert math.prod(shape) == math.prod(sizes.values() or [1])
    return Layout(config, mesh)
