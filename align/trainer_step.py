"""One step of a trainer as one program: parts of a batch one after the other, then the update.

What is trained is all parameters, or adapters beside frozen ones; a reward model's head as well.
The state is donated, the frozen parameters are an argument that stays. Cost: `trainer_losses`, and
28 bytes of traffic a trained number for AdamW's update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from align import lora
from align.lora import Adapters
from align.trainer_config import LoRA, Reward, TrainerConfig
from align.trainer_losses import Batch, Metrics, Objective
from align.value_model import ValueModel
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Leaf, Params
from jaxinfra.train.step import TrainState, accumulated, applied

Step = Callable[[TrainState, Batch, Params | None], tuple[TrainState, Metrics]]


@struct.dataclass
class Trained:
    """What gradients change: all parameters or adapters, and a reward model's head."""

    params: Params | None = None
    adapters: Adapters | None = None
    value: Leaf = None  # [D]
    value_bias: Leaf = None  # []


def begin(
    config: TrainerConfig, model: ModelConfig, params: Params
) -> tuple[Trained, Params | None]:
    """What is trained at the start, and what is frozen: None where nothing is."""
    value = bias = None
    if isinstance(config, Reward):  # a head of zeros: every reward is 0 at the start
        value, bias = jnp.zeros((model.d_model,), jnp.float32), jnp.zeros((), jnp.float32)
    if not config.lora.rank:
        return Trained(params, None, value, bias), None
    adapters = lora.init(jax.random.key(config.seed), model, config.lora)
    return Trained(None, adapters, value, bias), params


def policy(trained: Trained, frozen: Params | None, how: LoRA) -> Params | ValueModel:
    """The model of what is trained and what is frozen."""
    params: Any = trained.params
    if trained.adapters is not None:
        assert frozen is not None
        params = lora.attach(frozen, trained.adapters, how)
    return (
        params if trained.value is None else ValueModel(params, trained.value, trained.value_bias)
    )


def merged(trained: Trained, frozen: Params | None, how: LoRA) -> Params | ValueModel:
    """The model in float32 with its adapters multiplied out: for use and for saving."""
    if trained.adapters is not None:
        assert frozen is not None
        params = lora.merge(_cast(frozen, jnp.float32), trained.adapters, how)
        trained = Trained(params, None, trained.value, trained.value_bias)
    return policy(trained, None, how)


def make_step(
    config: TrainerConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    dtype: Any,
    rows: Any = None,
) -> Step:
    """The compiled `step(state, batch, frozen) -> (state, metrics)`; `state` is donated.

    Metrics are the objective's, as means over the batch, and loss, tokens (of all sequences,
    padding not counted), grad_norm (before clipping), lr and skipped (so far). A step whose loss or
    gradient is not finite changes nothing but the state's counters. `rows` is the sharding of a
    batch's leading axis, where state and frozen parameters lie on a mesh (`align.trainer_mesh`).
    """
    parts = config.accumulate

    def step(state: TrainState, batch: Batch, frozen: Params | None) -> tuple[TrainState, Metrics]:
        if rows is not None:
            batch = jax.lax.with_sharding_constraint(dict(batch), rows)
        compute = _cast(state.params, dtype)
        count = objective.counted(batch) / parts

        def loss(trained: Trained, part: Batch) -> tuple[Array, Metrics]:
            total, metrics = objective.loss(policy(trained, frozen, config.lora), part, count)
            return total / parts, {n: m / parts for n, m in metrics.items()} | {
                "loss": total / parts
            }

        def gradient(part: Batch) -> tuple[Metrics, Any]:
            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(compute, part)
            return metrics, _cast(grads, jnp.float32)

        metrics, grads = accumulated(gradient, batch, parts)
        state, metrics = applied(state, metrics, grads, optimizer, schedule)
        return state, metrics | {"tokens": jnp.sum(batch["sizes"])}

    return jax.jit(step, donate_argnums=0)


def make_evaluation(
    config: TrainerConfig, objective: Objective, dtype: Any
) -> Callable[[Trained, Batch, Params | None], Metrics]:
    """The compiled `evaluate(trained, batch, frozen) -> metrics`, loss among them."""

    def evaluate(trained: Trained, batch: Batch, frozen: Params | None) -> Metrics:
        model = policy(_cast(trained, dtype), frozen, config.lora)
        loss, metrics = objective.loss(model, batch, objective.counted(batch))
        return metrics | {"loss": loss}

    return jax.jit(evaluate)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
