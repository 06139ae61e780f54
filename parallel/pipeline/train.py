"""The model as a pipeline: gradients for the step builders of `parallel.data`, by any schedule.

A stage of P keeps L / (C P) layers a chunk, or as many as `stages.balanced` says; the embedding
and the head are on every stage, cut by the other axes, and used by the first and the last: their
gradients are summed over pp once a step, which is also what ties an embedding that is a head.
Inner axes (dp, fsdp, cp, tp) work inside a stage as they do without a pipeline: which branch a
device takes depends on its stage alone, so the members of an inner group always meet. (Messages
have no groups: XLA:CPU makes all devices meet.)

    pipelined = local_gradients(layout, options, schedule.make("1f1b", 4, 8))
    step = data.zero1(layout, optimizer, options, pipelined)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinfra.errors import UserError
from jaxinfra.model.params import Layer, Params
from jaxinfra.train.step import Metrics
from parallel import model
from parallel.data import LOADS, LocalGradients
from parallel.layout import Layout
from parallel.mesh import Axis, ensure_varying, index
from parallel.model import Options, Rows
from parallel.pipeline import run
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.stages import collected, even, order, spread


def local_gradients(
    layout: Layout,
    options: Options,
    schedule: Schedule,
    layers: Sequence[int] | None = None,
    in_order: bool = False,
) -> LocalGradients:
    """Forward and backward of a device's rows through its stage, without a reduction.

    Parameters come in the order of `stages.to_stages`, or `in_order` of the model; `layers` says
    how many each virtual stage holds, by default as many as each other one, and the layout is of
    their places. Raises UserError where the schedule does not fit the mesh, the model or
    `options.accumulate`, which must be its number of microbatches.
    """
    config = layout.config
    _check(layout, options, schedule)
    layers = even(config.num_layers, schedule) if layers is None else layers
    whole_stages = len(set(layers)) == 1
    places = order(layers, schedule).reshape(schedule.stages, schedule.chunks, -1)

    def gradients(params: Params, rows: Rows, extras: Any) -> tuple[Metrics, Params]:
        factor, _, bias = extras
        count = model.count_of(rows)
        compute = jax.tree.map(lambda leaf: leaf.astype(options.dtype), params)
        compute = model.cast_varying(compute, options)
        if in_order:
            chunked = spread(compute.layers, schedule)
        else:
            chunked = jax.tree.map(
                lambda leaf: leaf.reshape(schedule.chunks, -1, *leaf.shape[1:]), compute.layers
            )
        own = jnp.asarray(places)[index(Axis.PP)]  # [C, places]
        here = ensure_varying((own >= 0).astype(jnp.float32), Axis)
        biases = None if bias is None else ensure_varying(bias[own], Axis)

        def body(chunk: tuple[Layer, Array, Any], x: Array, rows: Rows) -> Array:
            layers, here, biases = chunk
            if not schedule.splits:
                skip = None if whole_stages else here
                return model.blocks(layers, config, x, rows, options, bias=biases, real=skip)[0]
            for i in range(here.shape[0]):
                layer, bias = jax.tree.map(lambda leaf, i=i: leaf[i], (layers, biases))
                y, _ = model.block(x, layer, config, rows, options, bias=bias)
                x = y if whole_stages else jnp.where(here[i] > 0, y, x)
            return x

        def last(shared: Params, x: Array, rows: Rows) -> tuple[Array, Metrics]:
            loss, nll = model.loss_sums(shared, config, x, rows, options)
            sums = {"loss": loss / count, "nll": nll / count}
            return loss / count if factor is None else loss / count * factor, sums

        whole = run.Model(
            lambda shared, rows: model.embed(shared, config, rows, options), body, last
        )
        shared = _with_layers(compute, None)
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(schedule.microbatches, -1, leaf.shape[1]), dict(rows)
        )
        sums, (of_layers, _, loads), of_shared = run.gradients(
            schedule, whole, (chunked, here, biases), shared, parts
        )
        if bias is not None:  # empty places counted for no layer
            at = jnp.where(own >= 0, own, config.num_layers)
            sums[LOADS] = jnp.zeros_like(bias).at[at].add(loads, mode="drop")
        if in_order:
            of_layers = collected(of_layers, schedule)
        of_layers = jax.tree.map(lambda g, leaf: g.reshape(leaf.shape), of_layers, params.layers)
        return sums, _with_layers(of_shared, of_layers)

    return gradients


def _with_layers(params: Params, layers: Any) -> Params:
    return Params(params.embed, layers, params.final_norm, params.unembed)


def _check(layout: Layout, options: Options, schedule: Schedule) -> None:
    stages = layout.mesh.shape.get(Axis.PP, 1)
    if schedule.stages != stages:
        raise UserError(f"schedule: {schedule} on a mesh with pp={stages}; make them equal")
    if layout.config.experts and layout.config.experts.balance_coef:
        raise UserError(
            "schedule: the balance loss is a product of means over all layers, which no stage has; "
            "set the model's balance_coef to 0 under pp; a router_bias_update_rate balances there"
        )
    if layout.mesh.shape.get(Axis.CP, 1) > 1 and options.context in ("ring", "usp"):
        raise UserError(
            f"context={options.context}: its messages would stand in a branch that other stages do "
            "not take, and wait for them; under pp choose gather or ulysses"
        )
    if options.fp8:
        raise UserError("precision=float8: a pipeline's stages have no scales; leave pp out")
    if options.accumulate != schedule.microbatches:
        raise UserError(
            f"schedule: {schedule.microbatches} microbatches and accumulate={options.accumulate}; "
            "make them equal"
        )
