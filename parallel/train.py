"""Training runs on a mesh: the loop of `jaxinfra.train` with a step of this layer.

Everything a run does on one device it does here: evaluation, samples, checkpoints, resumption. A
checkpoint is written from the shards and read onto any other mesh.

    python -m jaxinfra train --mesh dp=2,tp=2,pp=2 --schedule 1f1b --accumulate 4 --emulate 8
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from jaxinfra.train import loop
from jaxinfra.train.config import TrainConfig
from jaxinfra.train.loss import Batch
from jaxinfra.train.optimizer import schedule as rate_of
from jaxinfra.train.step import Metrics, Step, TrainState
from parallel import balance, data, hosts, mesh, precision
from parallel.layout import Layout
from parallel.mesh import Axis, shardings
from parallel.model import Options
from parallel.pipeline import schedule as pipeline
from parallel.pipeline.train import local_gradients

# XLA's options on several GPUs, the best of seven sets by `benchmarks.two_gpus`: instructions are
# ordered by a model of latencies, so that a message starts as early and ends as late as it can, and
# the messages of one layer are one.
OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**27,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**27,
}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How a model is spread over devices."""

    mesh: str = "dp=1"
    """Sizes of axes: dp, fsdp, ep, cp, tp, pp, as in dp=2,tp=4."""
    zero: int = 0
    """What dp cuts: 1 the optimiser's moments, 2 gradients too. (fsdp cuts parameters as well.)"""
    schedule: str = "1f1b"
    """Of the pipeline, where the mesh has pp; its microbatches are those accumulated."""
    context: str = "ring"
    """Where the mesh has cp: ring, gather, ulysses or usp."""
    sequence: bool = True
    """Where the mesh has tp: positions are cut between its matrices."""
    capacity_factor: float | None = None
    """Room of experts' queues; by default no token is dropped."""

    dispatch: str = "padded"
    """Of tokens to experts: padded, ragged or ring."""
    precision: str = ""
    """Of products, where other than the run's dtype: float16, float8 or float8-delayed."""
    offload: bool = False
    """Layers' inputs wait in the host's memory for the backward pass, which computes all else."""

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2):
            raise UserError(f"zero={self.zero}: give 0, 1 or 2; fsdp in the mesh is ZeRO-3")
        if self.precision and self.precision not in precision.PRECISIONS:
            raise UserError(
                f"precision={self.precision!r}: choose one of {', '.join(precision.PRECISIONS)}"
            )


def build(
    strategy: Strategy,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    devices: Any = None,
    **options: Any,
) -> tuple[Layout, Step, TrainState]:
    """(layout, compiled step, specs of its state) of any product of axes.

    With a `strategy.precision` the optimizer is one that `precision.scaled` made.

    Args:
      options: fields of `Options` that a strategy does not have: dtype, accumulate, remat, z_loss,
        unroll.
    """
    sizes = mesh.parse(strategy.mesh)
    layout = Layout(config, mesh.make(sizes, devices))
    how = _options(strategy, **options)
    if how.fp8 and config.experts and how.dispatch != "padded":
        raise UserError(
            f"precision=float8: dispatch={how.dispatch} multiplies groups of rows, which have no "
            "float8 product; choose dispatch=padded"
        )
    local = None
    if (stages := sizes.get(Axis.PP, 1)) > 1:
        table = pipeline.make(strategy.schedule, stages, how.accumulate)
        local = local_gradients(layout, how, table, in_order=True)
    name = f"zero{strategy.zero}" if strategy.zero else "zero3" if Axis.FSDP in sizes else "dp"
    moments = layout.cut_further(Axis.DP) if strategy.zero else None
    step = data.STEPS[name](layout, optimizer, how, local)
    return layout, step, layout.state_specs(optimizer, moments)


def _options(strategy: Strategy, **options: Any) -> Options:
    return Options(
        context=strategy.context, sequence=strategy.sequence,
        capacity_factor=strategy.capacity_factor, dispatch=strategy.dispatch,
        fp8="float8" in strategy.precision, **options,
    )  # fmt: skip


def train(
    config: TrainConfig,
    strategy: Strategy,
    *,
    console: Console | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> loop.Result:
    """`jaxinfra.train.loop.train` on a mesh; the same arguments, errors and result."""
    return _Run(config, strategy, console or Console(), on_row or (lambda row: None)).run()


class _Run(loop._Run):
    """A run whose state lies on a mesh and whose step is one of this layer's."""

    def __init__(
        self, config: TrainConfig, strategy: Strategy, console: Console, on_row: Callable
    ) -> None:
        self.strategy = strategy
        super().__init__(config, console, on_row)
        rate = rate_of(config.optimizer, config.steps)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            lr = jnp.asarray(rate(state.step - state.skipped), jnp.float32)
            state, metrics = self.inner(state, batch)
            return state, metrics | {"lr": lr}

        if config.router_bias_update_rate:
            how = _options(dataclasses.replace(strategy, precision=""), dtype=self.dtype)
            evaluate = balance.evaluation(self.layout, how)

            def with_bias(params: P.Params, batch: Batch) -> Any:
                bias: Any = balance.bias_of(self.state.opt_state)
                return evaluate(params, bias, batch)

            self.evaluate = with_bias
        options = OVERLAP if jax.default_backend() == "gpu" and jax.device_count() > 1 else None
        compiled = jax.jit(step, donate_argnums=0, compiler_options=options)
        if jax.process_count() == 1:
            self.step = compiled
            return
        rows = NamedSharding(self.layout.mesh, PartitionSpec(self.layout.rows[0], None))
        self.step = lambda state, batch: compiled(state, hosts.placed(batch, rows))

    def _start(self, make_params: Callable[[], P.Params]) -> TrainState:
        remat = "offload" if self.strategy.offload else self.config.remat
        dtype = self.dtype
        if rate := self.config.router_bias_update_rate:
            self.optimizer = balance.balanced(self.optimizer, rate, self.model_config)
        if self.strategy.precision:
            self.optimizer = precision.scaled(
                self.optimizer, self.strategy.precision, self.model_config
            )
            dtype = jnp.float16 if self.strategy.precision == "float16" else dtype
        self.layout, self.inner, specs = build(
            self.strategy, self.model_config, self.optimizer, dtype=dtype,
            accumulate=self.config.accumulate, remat=remat, z_loss=self.config.z_loss,
            unroll=self.unroll,
        )  # fmt: skip
        places = shardings(self.layout.mesh, specs)

        def create(params: P.Params) -> TrainState:
            return TrainState.create(params, self.optimizer)

        if self.config.resume:
            shapes = jax.eval_shape(create, P.abstract(self.model_config))
            like = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                shapes, places,
            )  # fmt: skip
            restored = self.restored(like)
            self._apart()
            return restored
        self._apart()
        if self.config.finetune is None:  # each device makes its own part
            return jax.jit(lambda: create(make_params()), out_shardings=places)()
        return jax.jit(create, out_shardings=places)(
            jax.device_put(jax.device_get(make_params()), places.params)
        )

    def _steps(self, asked: Any) -> int:
        return super()._steps(asked if jax.process_count() == 1 else hosts.Agreed(asked))

    def _apart(self) -> None:
        """Hosts share the checkpoints; all but the first log in folders of their own."""
        if jax.process_index():
            self.out = self.out / f"host-{jax.process_index()}"
            self.console = Console(quiet=True)

    def _sample(self, seed: int) -> str:
        with self._whole():
            return super()._sample(seed)

    def export(self) -> Path:
        with self._whole():
            if jax.process_index():
                return self.out.parent / "model"
            return super().export()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """With several hosts: the parameters as one host's arrays, as generating and saving want.

        Every host needs room for them.
        """
        if jax.process_count() == 1:
            yield
            return
        state = self.state
        self.state = state.replace(params=hosts.whole(state.params))  # pyright: ignore
        try:
            yield
        finally:
            self.state = state
