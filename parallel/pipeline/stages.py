"""Which layers a stage holds: as many on each, or fewer where a stage has other work.

The last stage also scores: its head costs D V multiplications a token, a layer D H (2 N + 2 K) +
3 D F + N H T, so for a large vocabulary the head is worth several layers, and a stage that is
longer than the others sets the pace of all. `balanced` gives the last stage fewer layers by that
much (the embedding is a look-up and weighs nothing). Layers need not divide by stages either.

Arrays stay stacks of one length: stages with fewer layers have places that hold zeros, take no time
and get no gradient. Parameters of a pipeline are in the order of `to_stages`, or in the model's
(checkpoints, files, other meshes): with chunks a stage then holds layers of other stages, which
`spread` sends home before a step and `collected` sends back as gradients, C messages of a chunk
each way, all stages at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from parallel.mesh import Axis, index
from parallel.pipeline.schedule import Schedule


def head_in_layers(config: ModelConfig, seq_len: int) -> float:
    """What the head costs, in layers; of a mixture the experts that a token chooses count."""
    D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    wide = config.experts.top_k * config.experts.d_ff if config.experts else config.d_ff
    layer = D * H * (2 * N + 2 * K) + 3 * D * wide + N * H * seq_len
    return D * config.vocab_size / layer


def balanced(config: ModelConfig, seq_len: int, schedule: Schedule) -> tuple[int, ...]:
    """Layers of each virtual stage so that the longest is as short as can be; one at least."""
    virtual = schedule.stages * schedule.chunks
    if config.num_layers < virtual:
        raise UserError(f"schedule: {config.num_layers} layers are fewer than {virtual} stages")
    layers = [1] * virtual
    more = [0.0] * (virtual - 1) + [head_in_layers(config, seq_len)]
    for _ in range(config.num_layers - virtual):
        shortest = min(range(virtual), key=lambda v: layers[v] + more[v])
        layers[shortest] += 1
    return tuple(layers)


def even(num_layers: int, schedule: Schedule) -> tuple[int, ...]:
    """As many on each; raises UserError where they do not divide."""
    virtual = schedule.stages * schedule.chunks
    if num_layers % virtual:
        raise UserError(
            f"schedule: {num_layers} layers are no multiple of {schedule.stages} stages of "
            f"{schedule.chunks} chunks; give another pp, or layers=balanced(...)"
        )
    return (num_layers // virtual,) * virtual


def order(layers: Sequence[int], schedule: Schedule) -> np.ndarray:
    """The layer in each place, -1 in empty ones: all chunks of stage 0, then of stage 1, ..."""
    places = np.full((len(layers), max(layers)), -1)
    first = np.cumsum([0, *layers])
    for v, count in enumerate(layers):
        places[v, :count] = np.arange(first[v], first[v + 1])
    return places.reshape(schedule.chunks, schedule.stages, -1).swapaxes(0, 1).reshape(-1)


def padded(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The configuration whose layers are places."""
    return config.replace(num_layers=len(layers) * max(layers))


def to_stages(params: Params, layers: Sequence[int], schedule: Schedule) -> Params:
    """Parameters [L, ...] in the places of stages."""
    at = order(layers, schedule)
    real = at >= 0

    def one(leaf: Any) -> Any:
        mask = jnp.asarray(real).reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(mask, leaf[np.maximum(at, 0)], jnp.zeros((), leaf.dtype))

    return _with_layers(params, jax.tree.map(one, params.layers))


def from_stages(params: Params, layers: Sequence[int], schedule: Schedule) -> Params:
    """The inverse of `to_stages`."""
    at = order(layers, schedule)
    places = np.flatnonzero(at >= 0)
    back = places[np.argsort(at[places])]
    return _with_layers(params, jax.tree.map(lambda leaf: leaf[back], params.layers))


def spread(layers: Any, schedule: Schedule) -> Any:
    """Inside `shard_map`: a stage's chunks [C, ...], from the L / P layers it has in order."""
    C = schedule.chunks
    chunks = jax.tree.map(lambda leaf: leaf.reshape(C, -1, *leaf.shape[1:]), layers)
    return chunks if C == 1 else _exchanged(chunks, _rounds(schedule))


def collected(chunks: Any, schedule: Schedule) -> Any:
    """The inverse of `spread`."""
    if schedule.chunks > 1:
        back = [_Round(to, take, [(b, a) for a, b in pairs])
                for take, to, pairs in _rounds(schedule)]  # fmt: skip
        chunks = _exchanged(chunks, back)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), chunks)


class _Round(NamedTuple):
    """A message from every stage to some stage."""

    take: list[int]  # the chunk that each stage sends
    put: list[int]  # where each stage puts what it gets
    pairs: list[tuple[int, int]]


def _rounds(schedule: Schedule) -> list[_Round]:
    """C rounds in which virtual stages v, C to a stage in model order, come to stage v mod P.

    Round (v + v // lcm(C, P)) mod C takes one chunk from every stage and brings one to every stage:
    of C neighbours each has another remainder, and of those with one v mod P each that would have
    the same has another quotient.
    """
    P, C = schedule.stages, schedule.chunks
    rounds = []
    for r in range(C):
        take, put, pairs = [0] * P, [0] * P, []
        for v in range(C * P):
            if (v + v // math.lcm(C, P)) % C == r:
                take[v // C], put[v % P] = v % C, v // P
                pairs.append((v // C, v % P))
        rounds.append(_Round(take, put, pairs))
    return rounds


def _exchanged(chunks: Any, rounds: Sequence[_Round]) -> Any:
    stage = index(Axis.PP)

    def one(leaf: Any) -> Any:
        out = jnp.zeros_like(leaf)
        for take, put, pairs in rounds:
            got = jax.lax.ppermute(leaf[jnp.asarray(take)[stage]], Axis.PP.value, pairs)
            out = out.at[jnp.asarray(put)[stage]].set(got)
        return out

    return jax.tree.map(one, chunks)


def _with_layers(params: Params, layers: Any) -> Params:
    return Params(params.embed, layers, params.final_norm, params.unembed)
