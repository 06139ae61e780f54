"""Which layers a stage holds: as many on each, or fewer where a stage has other work.

The last stage also scores: its head costs D V multiplications a token, a layer D H (2 N + 2 K) +
3 D F + N H T, so for a large vocabulary the head is worth several layers, and a stage that is
longer than the others sets the pace of all. `balanced` gives the last stage fewer layers by that
much (the embedding is a look-up and weighs nothing). Layers need not divide by stages either.

Arrays stay stacks of one length: stages with fewer layers have places that hold zeros, take no time
and get no gradient. Parameters of a pipeline are in the order of `to_stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
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


def _with_layers(params: Params, layers: Any) -> Params:
    return Params(params.embed, layers, params.final_norm, params.unembed)
