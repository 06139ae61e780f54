"""Optimisers from optax: AdamW, or Muon for the matrices inside layers, on a warm-up and cosine.

Memory: AdamW keeps two float32 arrays a parameter, Muon one for its matrices. Muon's Newton-Schulz
iteration costs 5 (4 m^2 n + 2 m^3) FLOPs a step for an m x n matrix, m <= n: nothing beside a batch
of many thousand tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jaxinfra.model.params import Params
from jaxinfra.train.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update number i (from 0): a line up, then a cosine down to the end."""
    rate = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )
    return _promoting(rate)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW (arXiv 1711.05101) or Muon (arXiv 2502.16982), for a run of `steps`.

    Muon's updates are scaled to AdamW's size (0.2 root mean square), so that one learning rate and
    one weight decay suit both. What it does not take (embeddings, norms, biases, routers) goes to
    Adam with Nesterov momentum, as in optax.
    """
    if config.name == "muon":
        direction = optax.contrib.muon(
            learning_rate=-1.0,  # its sign is turned here, and again with the schedule's below
            eps=config.eps,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrices,  # pyright: ignore[reportArgumentType]
        )
    else:
        direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )
    return optax.GradientTransformation(chain.init, _promoting(chain.update))


def _promoting(function: Callable) -> Callable:
    """`function` of optax, which mixes dtypes, made to work where jax forbids that."""

    @functools.wraps(function)
    def promoting(*args):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return promoting


def decayed(params: Params) -> Any:
    """True for the leaves that weight decay shrinks: all but norms and biases."""
    return jax.tree.map_with_path(
        lambda path, _: not path[-1].name.endswith(("norm", "bias")), params
    )


_MATRIX_AXES = {  # name: (inputs, outputs), counted from the last axis; axes before are batches
    "q": (-3, (-2, -1)), "k": (-3, (-2, -1)), "v": (-3, (-2, -1)), "o": ((-3, -2), -1),
    "gate": (-2, -1), "up": (-2, -1), "down": (-2, -1),
}  # fmt: skip


def matrices(params: Params) -> Any:
    """A tree like `params`: the axes that make each leaf a stack of matrices; None for the rest.

    Heads count as one matrix [D, N H], layers and experts each as their own.
    """

    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        name = path[-1].name
        return MuonDimensionNumbers(*_MATRIX_AXES[name]) if name in _MATRIX_AXES else None

    return jax.tree.map_with_path(axes, params)
