"""Data parallelism four ways: what each device keeps, what is sent, in four step builders.

n replicas, P parameters of 4 bytes, Adam's two moments; Rajbhandari et al. 2019 (arXiv 1910.02054,
figure 1 and section 7), per device and step (gradients stand second):

    dp      keeps 4P parameters, 4P, 8P moments  sends 2 (n-1)/n 4P   all-reduce
    zero1   keeps 4P, 4P, 8P/n                   sends 3 (n-1)/n 4P   all-reduce, all-gather
    zero2   keeps 4P, 4P/n, 8P/n                 sends 2 (n-1)/n 4P   reduce-scatter, all-gather
    zero3   keeps 4P/n, 4P/n, 8P/n               sends 3 (n-1)/n 4P   the same, a layer at a time

zero1 sends more than it must: its all-reduce is a reduce-scatter and an all-gather, of which the
second is thrown away. That is what zero2 mends. All four share the optimiser, which sees whole
arrays with shardings and so is right for clipping by the global norm, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxinfra.errors import UserError
from jaxinfra.model.params import Params
from jaxinfra.train.loss import Batch, target_weights
from jaxinfra.train.step import Metrics, Step, TrainState, accumulated, applied
from parallel import balance, model, precision
from parallel.layout import Layout, summed
from parallel.mesh import DATA, Axis, ensure_varying, present, shardings, varying
from parallel.model import Options, Rows

# (parameters, rows, `_extras`) of a device -> (its share of the metrics, its gradients, nothing
# summed yet)
LocalGradients = Callable[[Params, Rows, Any], tuple[Metrics, Params]]
DP = Axis.DP.value
SEEN = "seen"  # among the metrics: largest values of products, of which the largest is taken
LOADS = "loads"  # and how many tokens chose each expert, where a bias balances them


def local_gradients(layout: Layout, options: Options) -> LocalGradients:
    """Forward and backward of a device's rows, in `options.accumulate` parts, without a reduction.

    The parts add up in one accumulator that is typed as varying over the data axes: that no device
    has summed it with another's is part of its type.
    """

    def gradients(params: Params, rows: Rows, extras: Any) -> tuple[Metrics, Params]:
        count = model.count_of(rows)
        compute = jax.tree.map(lambda leaf: leaf.astype(options.dtype), params)
        compute = model.cast_varying(compute, options)
        factor, *others = extras
        others = ensure_varying(others, Axis)

        def part(rows: Rows) -> tuple[Metrics, Params]:
            def of(params: Params, others: Any) -> tuple[Array, Metrics]:
                loss, aux = model.local_loss(params, layout.config, rows, count, options, *others)
                return loss if factor is None else loss * factor, {"loss": loss, **aux}

            (_, metrics), (grads, (seen, loads)) = jax.value_and_grad(of, (0, 1), has_aux=True)(
                compute, others
            )
            if seen is not None:
                metrics[SEEN] = seen[..., 0]
            if loads is not None:
                metrics[LOADS] = loads
            return metrics, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        if options.accumulate == 1:
            return part(rows)
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(options.accumulate, -1, leaf.shape[1]), dict(rows)
        )
        first = part(jax.tree.map(lambda leaf: leaf[0], parts))
        rest = jax.tree.map(lambda leaf: leaf[1:], parts)

        def add(sums: tuple[Metrics, Params], rows: Rows) -> tuple[tuple[Metrics, Params], None]:
            more = part(rows)
            total = jax.tree.map(jnp.add, sums, more)
            if SEEN in more[0]:
                total[0][SEEN] = jnp.maximum(sums[0][SEEN], more[0][SEEN])
            return total, None

        return lax.scan(add, first, rest)[0]

    return gradients


def dp(
    layout: Layout, optimizer: optax.GradientTransformation, options: Options, local=None
) -> Step:
    """Every device keeps all; gradients are summed once, by one all-reduce."""
    local = local or local_gradients(layout, options)

    def gradients(params: Params, rows: Rows, extras: Any) -> tuple[Metrics, Params]:
        metrics, grads = local(params, rows, extras)
        return _total(metrics), summed(grads, layout.specs)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        metrics, grads = _mapped(layout, gradients, layout.specs)(state, batch)
        return _update(optimizer, state, state.params, grads, metrics)

    return _compiled(layout, step, layout.state_specs(optimizer), options)


def zero1(
    layout: Layout, optimizer: optax.GradientTransformation, options: Options, local=None
) -> Step:
    """Moments are cut: after the all-reduce each device updates its part; parts are gathered."""
    local = local or local_gradients(layout, options)
    own = layout.cut_further(Axis.DP)

    def gradients(params: Params, rows: Rows, extras: Any) -> tuple[Metrics, Params]:
        metrics, grads = local(params, rows, extras)
        grads = summed(grads, layout.specs)
        return _total(metrics), _along_dp(_own_part, grads, layout.specs, own)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        metrics, grads = _mapped(layout, gradients, own)(state, batch)
        params = lax.with_sharding_constraint(state.params, shardings(layout.mesh, own))
        return _update(optimizer, state, params, grads, metrics)

    return _compiled(layout, step, layout.state_specs(optimizer, own), options)


def zero2(
    layout: Layout, optimizer: optax.GradientTransformation, options: Options, local=None
) -> Step:
    """Gradients are cut as well: a reduce-scatter gives each device the sum of its part alone."""
    local = local or local_gradients(layout, options)
    own = layout.cut_further(Axis.DP)

    def gradients(params: Params, rows: Rows, extras: Any) -> tuple[Metrics, Params]:
        metrics, grads = local(params, rows, extras)
        grads = _along_dp(_scattered, grads, layout.specs, own)
        return _total(metrics), summed(grads, own)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        metrics, grads = _mapped(layout, gradients, own)(state, batch)
        params = lax.with_sharding_constraint(state.params, shardings(layout.mesh, own))
        return _update(optimizer, state, params, grads, metrics)

    return _compiled(layout, step, layout.state_specs(optimizer, own), options)


def zero3(
    layout: Layout, optimizer: optax.GradientTransformation, options: Options, local=None
) -> Step:
    """Parameters are cut too, over fsdp: each layer is gathered for its use and dropped after it.

    The gradient leaves the backward pass as a reduce-scatter of the same part (`layout.gathered`),
    so here is nothing left to do but the sum over dp: with both axes this is HSDP.
    """
    local = local or local_gradients(layout, options)

    def gradients(params: Params, rows: Rows, extras: Any) -> tuple[Metrics, Params]:
        metrics, grads = local(params, rows, extras)
        return _total(metrics), summed(grads, layout.specs)  # norms of heads, and over dp

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        metrics, grads = _mapped(layout, gradients, layout.specs)(state, batch)
        return _update(optimizer, state, state.params, grads, metrics)

    return _compiled(layout, step, layout.state_specs(optimizer), options)


def annotated(
    layout: Layout, optimizer: optax.GradientTransformation, options: Options, schedule: Any
) -> Step:
    """FSDP without a collective in the source: one device's step, and arrays that are cut.

    Annotations say where arrays lie and the compiler finds what to send. They stand where it would
    choose badly: rows and activations are cut by rows, and a layer's weights are whole where they
    are used. Left to itself it keeps weights cut by width, sums activations in every layer and
    holds those of all rows on each device. Of dense models.
    """
    config, mesh = layout.config, layout.mesh
    if config.experts or set(mesh.shape) - {Axis.DP, Axis.FSDP}:
        raise UserError("annotated: takes dense models over dp and fsdp; choose zero3")
    own = PartitionSpec(layout.rows[0])
    devices = math.prod(mesh.shape.values())

    def loss_of(params: Params, rows: Rows, count: Array) -> tuple[Array, Metrics]:
        x = _annotated(model.embed(params, config, rows, options), own)
        x, _ = model.blocks(params.layers, config, x, rows, options)
        # Blocks of the head are of each device's rows.
        apart = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), (x, dict(rows)))
        sums = lambda x, rows: model.loss_sums(params, config, x, rows, options)  # noqa: E731
        loss, nll = jax.tree.map(jnp.sum, jax.vmap(sums)(*apart))
        return loss / count, {"nll": nll / count}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        count = jnp.maximum(jnp.sum(target_weights(batch)), 1.0)
        compute = jax.tree.map(lambda leaf: leaf.astype(options.dtype), state.params)

        def gradient(rows: Rows) -> tuple[Metrics, Params]:
            (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(compute, rows, count)
            return {"loss": loss, **aux}, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        def parted(rows: Array) -> Array:
            """Rows in such an order that a part has as many of each device's."""
            mine = rows.reshape(devices, options.accumulate, -1, rows.shape[1])
            return _annotated(mine.swapaxes(0, 1).reshape(rows.shape), own)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            rows = jax.tree.map(parted, dict(model.rows_of(batch)))
            metrics, grads = accumulated(gradient, rows, options.accumulate)
            grads = lax.with_sharding_constraint(grads, layout.specs)
        return applied(state, metrics, cast(Any, grads), optimizer, schedule)

    return _compiled(layout, step, layout.state_specs(optimizer), options)


def _annotated(x: Array, spec: PartitionSpec) -> Array:
    return lax.with_sharding_constraint(x, spec)


STEPS = {"dp": dp, "zero1": zero1, "zero2": zero2, "zero3": zero3}


def _total(metrics: Metrics) -> Metrics:
    axes = present((Axis.PP, *DATA))
    seen, loads = metrics.pop(SEEN, None), metrics.pop(LOADS, None)
    total = lax.psum(metrics, axes) if axes else metrics
    if seen is not None:
        total[SEEN] = lax.pmax(seen, tuple(sorted(varying(seen))))
    if loads is not None:
        total[LOADS] = balance.total(loads)
    return total


def _along_dp(function: Callable[[Array, int], Array], grads: Any, specs: Any, own: Any) -> Any:
    """`function(gradient, dimension)` of every leaf that `own` cuts further over dp."""

    def one(leaf: Array, spec: Any, further: Any) -> Array:
        cut = [d for d, e in enumerate(further) if e == DP and spec[d] != DP]
        return function(leaf, cut[0]) if cut else leaf

    return jax.tree.map(one, grads, specs, own)


def _own_part(leaf: Array, dim: int) -> Array:
    share = leaf.shape[dim] // lax.axis_size(DP)
    return lax.dynamic_slice_in_dim(leaf, lax.axis_index(DP) * share, share, dim)


def _scattered(leaf: Array, dim: int) -> Array:
    return lax.psum_scatter(leaf, DP, scatter_dimension=dim, tiled=True)


def _mapped(layout: Layout, gradients: Callable, out: Any) -> Callable:
    """`gradients` over the mesh, from a state and a whole batch."""
    mapped = jax.shard_map(
        gradients, mesh=layout.mesh, in_specs=(layout.specs, layout.rows, PartitionSpec()),
        out_specs=(PartitionSpec(), out),
    )  # fmt: skip
    cp = layout.mesh.shape.get(Axis.CP, 1)

    def whole(state: TrainState, batch: Batch) -> tuple[Metrics, Params]:
        return mapped(state.params, model.rows_of(batch, cp), _extras(state))

    return whole


def _extras(state: TrainState) -> tuple[Array | None, Array | None, Array | None]:
    """What a step computes with beside parameters: (factor on the loss, largest values, bias)."""
    return (*precision.scales(state.opt_state), balance.bias_of(state.opt_state))


def _update(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    params: Params,
    grads: Params,
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """The optimiser's update of whole arrays, as they are cut; skipped where not finite."""
    factor, _ = precision.scales(state.opt_state)
    grads = precision.unscaled(grads, factor)
    seen, loads = metrics.pop(SEEN, None), metrics.pop(LOADS, None)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        cast(Any, grads), state.opt_state, cast(Any, params), loads=loads
    )
    updated = (optax.apply_updates(cast(Any, params), updates), opt_state)
    new, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (params, state.opt_state)
    )
    opt_state = precision.after(opt_state, finite, seen)
    skipped = state.skipped + (~finite).astype(jnp.int32)
    metrics = metrics | {"grad_norm": norm, "skipped": skipped}
    if factor is not None:
        metrics["loss_scale"] = factor
    if loads is not None:
        metrics["max_violation"] = balance.violation(loads)
    return TrainState(new, opt_state, state.step + 1, skipped), metrics


def _compiled(layout: Layout, step: Step, specs: TrainState, options: Options) -> Step:
    """The compiled step: a state comes and goes as `specs` cut it, and its memory is used again."""
    state = shardings(layout.mesh, specs)
    whole = NamedSharding(layout.mesh, PartitionSpec())
    # Rows alone are cut here: of their T + 1 tokens, T will be.
    rows = NamedSharding(layout.mesh, PartitionSpec(layout.rows[0], None))

    def checked(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        model.check(layout.config, layout.mesh.shape, batch, options)
        state, metrics = step(state, batch)
        return state, metrics | {"tokens": jnp.sum(target_weights(batch))}

    return jax.jit(
        checked, in_shardings=(state, rows), out_shardings=(state, whole), donate_argnums=0
    )
