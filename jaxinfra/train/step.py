"""One training step as one program: forward, backward, clipping, update, and the guard.

Cost: three times the forward FLOPs (four with remat="full"), and 28 bytes of traffic a parameter
for AdamW's update (read and write the parameter and two moments, read the gradient, in float32).
The state is donated: the new one takes the old one's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.train.loss import Batch, next_token_loss, target_weights

Metrics = dict[str, Array]
Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


@struct.dataclass
class TrainState:
    """All that a run carries from step to step; the order of the data follows from `step`."""

    params: Any  # Params in float32
    opt_state: Any
    step: Int[Array, ""]  # steps taken, skipped ones included
    skipped: Int[Array, ""]  # steps whose loss or gradient was not finite

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step; parameters become float32."""
        masters: Any = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        # Two arrays: one that stands in two places cannot be donated.
        step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return cls(masters, optimizer.init(masters), step, skipped)


def make_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    dtype: Any = jnp.bfloat16,
    accumulate: int = 1,
    **options: Any,
) -> Step:
    """The compiled `step(state, batch) -> (state, metrics)`; `state` is donated.

    Args:
      schedule: the optimiser's, for the metric "lr" alone.
      dtype: of the computation; parameters are cast once a step, gradients are summed in float32.
      accumulate: the batch is computed in so many parts, one after the other; B is a multiple.
      options: those of `next_token_loss`: z_loss, block, remat, unroll, implementation.

    Metrics, all scalars: loss, nll (nats a token), grad_norm (before clipping), lr, tokens (targets
    in the batch) and skipped (so far). Where the loss or the gradient's norm is not finite, only
    `step` and `skipped` of the state change.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        count = jnp.sum(target_weights(batch))
        compute = jax.tree.map(lambda leaf: leaf.astype(dtype), state.params)

        def gradient(part: Batch) -> tuple[Metrics, Any]:
            (loss, aux), grads = jax.value_and_grad(next_token_loss, has_aux=True)(
                compute, config, part, count=jnp.maximum(count, 1.0), **options
            )
            return {"loss": loss, **aux}, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        metrics, grads = accumulated(gradient, batch, accumulate)
        state, metrics = applied(state, metrics, grads, optimizer, schedule)
        return state, metrics | {"tokens": count}

    return jax.jit(step, donate_argnums=0)


def applied(
    state: TrainState,
    metrics: Metrics,
    grads: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, Metrics]:
    """The state after an update by `grads`, or with its counters alone where something is nan.

    Looks at metrics["loss"] and the gradient's norm; adds grad_norm, lr and skipped to the metrics.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (state.params, state.opt_state)
    )
    skipped = state.skipped + (~finite).astype(jnp.int32)
    metrics = metrics | {
        "grad_norm": norm,
        "lr": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
        "skipped": skipped,
    }
    return TrainState(params, opt_state, state.step + 1, skipped), metrics


def accumulated(
    gradient: Callable[[Batch], tuple[Metrics, Any]], batch: Batch, parts: int
) -> tuple[Metrics, Any]:
    """The sum of `gradient` over `parts` parts of the batch's rows."""
    if parts == 1:
        return gradient(batch)
    split = jax.tree.map(lambda rows: rows.reshape(parts, -1, *rows.shape[1:]), dict(batch))
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda rows: rows[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, gradient(part)), None

    return jax.lax.scan(add, zeros, split)[0]


def make_evaluation(
    config: ModelConfig, *, dtype: Any = jnp.bfloat16, **options: Any
) -> Callable[[Params, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """The compiled `evaluate(params, batch) -> (sum of nll in nats, number of targets)`."""

    def evaluate(params: Params, batch: Batch) -> tuple[Array, Array]:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        _, aux = next_token_loss(params, config, batch, count=jnp.ones(()), **options)
        return aux["nll"], jnp.sum(target_weights(batch))

    return jax.jit(evaluate)
