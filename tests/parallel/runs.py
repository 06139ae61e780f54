"""Training runs on a mesh, to be compared with one device's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxinfra.train.step import Step, TrainState
from parallel import balance, data, precision
from parallel import mesh as M
from parallel.layout import Layout
from parallel.model import Options
from parallel.pipeline.schedule import Schedule, make
from parallel.pipeline.stages import even, from_stages, padded, to_stages
from parallel.pipeline.train import local_gradients
from tests.parallel import tiny
from tests.parallel.emulated import relative


def started(
    name: str,
    mesh: str,
    builder: str,
    options: Options,
    schedule: Schedule | None = None,
    scales: str = "",
    layers: Sequence[int] | None = None,
    rate: float = 0.0,
) -> tuple[Step, TrainState]:
    """A step of a model of tiny.MODELS, and the state placed as it wants it."""
    config, tx = tiny.MODELS[name], tiny.optimizer()
    state, local = tiny.start(config), None
    if rate:
        tx = balance.balanced(tx, rate, config)
        state = TrainState.create(state.params, tx)
    layout = Layout(padded(config, layers) if layers else config, M.make(M.parse(mesh)))
    if scales:
        tx = precision.scaled(tx, scales, layout.config)
        state = TrainState.create(state.params, tx)
    if schedule is not None:
        local = local_gradients(layout, options, schedule, layers)
        layers = layers or even(config.num_layers, schedule)
        state = TrainState.create(to_stages(state.params, layers, schedule), tx)
    if builder == "annotated":
        step = data.annotated(layout, tx, options, tiny.RATE)
    else:
        step = data.STEPS[builder](layout, tx, options, local)
    cut = layout.cut_further(M.Axis.DP) if builder in ("zero1", "zero2") else None
    return step, layout.place(state, layout.state_specs(tx, cut))


def trained(
    name: str,
    mesh: str,
    builder: str,
    packed: bool = True,
    schedule: str = "",
    scales: str = "",
    layers: Sequence[int] | None = None,
    rate: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """What three steps leave; with a schedule's name, through a pipeline."""
    if not schedule:
        begun = started(name, mesh, builder, Options(**options), None, scales, rate=rate)
        return tiny.run(*begun, packed)
    table = make(schedule, M.parse(mesh).get(M.Axis.PP, 1), options["accumulate"])
    begun = started(name, mesh, builder, Options(**options), table, scales, layers, rate)
    found = tiny.run(*begun, packed)
    layers = layers or even(tiny.MODELS[name].num_layers, table)
    for key in ("gradients", "params"):
        found[key] = from_stages(found[key], layers, table)
    return found


def differences(found: dict, wanted: dict) -> dict[str, float]:
    """The largest relative difference of the loss, of any gradient, of any parameter."""
    return {key: relative(found[key], wanted[key]) for key in ("loss", "gradients", "params")}
