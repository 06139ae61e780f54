"""Load balance of experts without a loss: a bias on each expert's score moves choices, not weights.

A balance loss pulls on the router's gradient. The bias does not: it is added to the scores where
the k experts are chosen and nowhere else, and after every step goes `rate` up for experts that had
less than their share of the choices and `rate` down for those that had more (Wang et al. 2024,
arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2, with rate 0.001).

The loads [L, E] are counts over all tokens of the batch: each device counts its own, and one
all-reduce of 4 L E bytes a step adds them up, so every device holds the same bias. On the way there
they are the cotangent of the bias: layer loops stack them, microbatches and the tasks of a pipeline
add them up, and recomputation does not count twice. The bias lies in the optimiser's state.

    python -m jaxinfra train --model MOE --mesh ep=2,dp=2 --router-bias-update-rate 1e-3 --emulate 4
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.train.loss import Batch
from parallel import model
from parallel.layout import Layout
from parallel.mesh import DATA, Axis, axes_of, present
from parallel.model import Options, Rows
from parallel.precision import Scaled


class Balanced(NamedTuple):
    """An optimiser's state with the bias that the next step chooses by."""

    bias: Float[Array, "L E"]  # float32
    inner: Any


def balanced(
    optimizer: optax.GradientTransformation, rate: float, config: ModelConfig
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` whose state begins with the bias; its update takes the `loads` of the step."""
    if config.experts is None:
        raise UserError(
            f"router_bias_update_rate={rate}: the model has no experts; choose one that has, or 0"
        )
    shape = (config.num_layers, config.experts.num_experts)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        return Balanced(jnp.zeros(shape, jnp.float32), optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None, *, loads: Any = None, **extra: Any):
        updates, after = inner.update(updates, state.inner, params, **extra)
        return updates, Balanced(adjusted(state.bias, loads, rate), after)

    return optax.GradientTransformationExtraArgs(init, update)


def adjusted(
    bias: Float[Array, "*L E"], loads: Float[Array, "*L E"], rate: float
) -> Float[Array, "*L E"]:
    """The bias of the next step: `rate` up for experts with less than the mean load, or down."""
    return bias + rate * jnp.sign(jnp.mean(loads, axis=-1, keepdims=True) - loads)


def bias_of(opt_state: Any) -> Float[Array, "L E"] | None:
    """The bias in an optimiser's state, where it has one."""
    inner = opt_state.inner if isinstance(opt_state, Scaled) else opt_state
    return inner.bias if isinstance(inner, Balanced) else None


def violation(loads: Float[Array, "L E"]) -> Float[Array, ""]:
    """The largest load over the mean, less one, on average over layers: MaxVio of the paper."""
    return jnp.mean(jnp.max(loads, axis=-1) / jnp.maximum(jnp.mean(loads, axis=-1), 1.0)) - 1


def total(loads: Float[Array, "L E"]) -> Float[Array, "L E"]:
    """Inside `shard_map`: the loads of all devices; tensor shards count the same tokens."""
    loads = lax.psum(loads, present(Axis))
    return loads / lax.psum(1, Axis.TP) if present((Axis.TP,)) else loads


def evaluation(
    layout: Layout, options: Options
) -> Callable[[Params, Array, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """`jaxinfra.train.step.make_evaluation` with a bias [L, E], which decides as in training."""
    # Every stage of a pipeline computes all layers.
    specs = jax.tree.map(
        lambda spec: PartitionSpec(*(None if entry == Axis.PP else entry for entry in spec)),
        layout.specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )  # fmt: skip
    shape = layout.mesh.shape
    parts = 1
    for axis in axes_of((layout.rows[0],)):
        parts *= shape[axis]

    def sums(params: Params, rows: Rows, bias: Array) -> tuple[Array, Array]:
        compute = jax.tree.map(lambda leaf: leaf.astype(options.dtype), params)
        compute = model.cast_varying(compute, options)
        count = model.count_of(rows)
        _, aux = model.local_loss(compute, layout.config, rows, count, options, bias=bias)
        axes = present((Axis.PP, *DATA))
        nll = lax.psum(aux["nll"], axes) if axes else aux["nll"]
        return nll / lax.psum(1, Axis.PP) * count if present((Axis.PP,)) else nll * count, count

    mapped = jax.shard_map(
        sums, mesh=layout.mesh, in_specs=(specs, layout.rows, PartitionSpec()),
        out_specs=PartitionSpec(),
    )  # fmt: skip

    def evaluate(params: Params, bias: Array, batch: Batch) -> tuple[Array, Array]:
        rows = model.rows_of(batch, shape.get(Axis.CP, 1))
        missing = -batch["tokens"].shape[0] % parts  # rows that weigh nothing
        rows = {name: jnp.pad(leaf, ((0, missing), (0, 0))) for name, leaf in rows.items()}
        return mapped(params, rows, bias)

    return jax.jit(evaluate)
