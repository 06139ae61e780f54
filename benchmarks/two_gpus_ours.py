"""This project's side of `benchmarks.two_gpus`: processes that tell what they measured.

Every step is that of `jaxinfra train --mesh`: `parallel.train.build` of a Strategy. A step is timed
from its call until its loss has arrived; the batches are on the devices before.

    python -m benchmarks.two_gpus_ours alone|meshes|plan|collectives|options [--tiny]
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.two_gpus_profile import collective_time, hidden
from benchmarks.two_gpus_shape import SHAPE, TINY, Shape, told
from jaxinfra.model import params as P
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.step import TrainState, make_step
from parallel import collectives, data, mesh
from parallel.census import census, overlap, totals
from parallel.layout import Layout
from parallel.mesh import shardings
from parallel.model import Options
from parallel.train import OVERLAP, Strategy, build

HYPER = OptimizerConfig(learning_rate=1e-4)
OPTIMIZER = make_optimizer(HYPER, steps=1000)
NO_LOOP = 64  # layers a turn of the loop over them: more than there are
# What a loop's turn begins with is sent in the turn before; under the names of jax 0.10 and 0.11.
PIPELINED: dict[str, Any] = {
    f"xla_gpu_{prefix}_{op}": value
    for prefix, value in (("enable_pipelined", True), ("pipeline", "COLLECTIVE_PIPELINING_MODE_ON"))
    for op in ("all_gather", "reduce_scatter", "all_reduce")
}
TRIALS: dict[str, tuple[dict[str, Any], int, str]] = {  # options, layers a turn, XLA's level
    "as XLA has it": ({}, 1, "UNKNOWN"),
    "latency hiding": (OVERLAP, 1, "UNKNOWN"),
    "hiding, 4 layers a turn": (OVERLAP, 4, "UNKNOWN"),
    "hiding, pipelined": (OVERLAP | PIPELINED, 4, "UNKNOWN"),
    "level O1": ({}, 1, "O1"),
    "level O1, 4 layers a turn": (OVERLAP, 4, "O1"),
    "hiding, no loop": (OVERLAP, NO_LOOP, "UNKNOWN"),
}
CHOSEN = OVERLAP


@dataclasses.dataclass(frozen=True)
class Variant:
    """A strategy and how its step is computed."""

    strategy: Strategy
    remat: str = "none"
    accumulate: int = 1
    annotated: bool = False


VARIANTS = {
    "DP": Variant(Strategy("dp=2")),
    "ZeRO-2": Variant(Strategy("dp=2", zero=2)),
    "FSDP": Variant(Strategy("fsdp=2")),
    "FSDP by annotations": Variant(Strategy("fsdp=2"), annotated=True),
    "TP + SP": Variant(Strategy("tp=2")),
    "PP, 1f1b": Variant(Strategy("pp=2", schedule="1f1b"), accumulate=8),
    "PP, eager 1f1b": Variant(Strategy("pp=2", schedule="eager-1f1b"), accumulate=8),
    "PP, interleaved": Variant(Strategy("pp=2", schedule="interleaved"), accumulate=8),
}


def dtype(shape: Shape) -> Any:
    """Of the computation."""
    return jnp.float32 if shape is TINY else jnp.bfloat16


def prepared(
    variant: Variant, shape: Shape, unroll: int = NO_LOOP
) -> tuple[Any, TrainState, Callable[[int], dict]]:
    """(step, state, batch of a number) on two devices."""
    options: dict[str, Any] = {
        "dtype": dtype(shape), "accumulate": variant.accumulate, "remat": variant.remat,
        "unroll": min(unroll, shape.config.num_layers),
    }  # fmt: skip
    if variant.annotated:
        layout = Layout(shape.config, mesh.make(mesh.parse(variant.strategy.mesh)))
        rate = schedule(HYPER, 1000)
        step = data.annotated(layout, OPTIMIZER, Options(**options), rate)
        specs = layout.state_specs(OPTIMIZER)
    else:
        layout, step, specs = build(variant.strategy, shape.config, OPTIMIZER, **options)
    places = shardings(layout.mesh, specs)
    create = jax.jit(
        lambda key: TrainState.create(P.init(key, shape.config), OPTIMIZER), out_shardings=places
    )
    rows = NamedSharding(layout.mesh, PartitionSpec(layout.rows[0], None))
    batches = [{"tokens": jax.device_put(t, rows)} for t in shape.tokens(2 * shape.rows)]
    return step, create(jax.random.key(0)), lambda i: batches[i % 3]


def accepted(options: dict[str, Any]) -> dict[str, Any]:
    """Those of XLA's options that this version has; the others are told."""
    kept = {}
    for name, value in options.items():
        try:
            jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options={name: value})
            kept[name] = value
        except Exception as error:
            print(f"left out {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return kept


def measured(
    step: Any, state: TrainState, batch: Callable[[int], dict], shape: Shape,
    options: dict[str, Any], profiled: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of a step, the program's memory and messages, and what of them is hidden."""
    begun = time.perf_counter()
    program = step.lower(state, batch(0)).compile(compiler_options=options)
    compiled = time.perf_counter() - begun
    memory = program.memory_analysis()
    seconds, loss = [], 0.0
    for i in range(shape.warmup + shape.steps):
        begun = time.perf_counter()
        state, metrics = program(state, batch(i))
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - begun)
    found = {
        "seconds": seconds[shape.warmup :], "compile_s": compiled, "loss": loss,
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
    }  # fmt: skip
    text = program.as_text()
    readings: dict[str, Callable[[], Any]] = {
        "sent": lambda: sum(c.sent for c in census(text)),
        "collectives": lambda: {
            op: n for op, (n, _) in totals(census(text, at_least=1024)).items()
        },
        "under": lambda: overlap(text),
        "hidden": lambda: _traced(program, state, batch) if profiled else None,
    }
    for name, read in readings.items():  # what cannot be read off costs no measurement
        try:
            found[name] = read()
        except Exception as error:
            print(f"{name}: {error!r}", file=sys.stderr)
    return found


def _traced(program: Any, state: TrainState, batch: Callable[[int], dict]) -> dict[str, float]:
    """Device 0's time in messages, and how much of it other kernels ran meanwhile; two steps."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(2):
                state, metrics = program(state, batch(i))
            float(metrics["loss"])
        times = collective_time(folder)
    messages, under, busy = hidden(times)
    return {"messages_s": messages / 2, "hidden_s": under / 2, "busy_s": busy / 2}


def alone(shape: Shape) -> None:
    """One device, with the step that a run without a mesh takes."""
    create = jax.jit(lambda key: TrainState.create(P.init(key, shape.config), OPTIMIZER))
    batches = [{"tokens": jnp.asarray(t)} for t in shape.tokens(shape.rows)]

    def of(unroll: int) -> dict[str, Any]:
        step = make_step(
            shape.config, OPTIMIZER, schedule(HYPER, 1000), dtype=dtype(shape), remat="none",
            unroll=unroll,
        )  # fmt: skip
        state = create(jax.random.key(0))
        return measured(step, state, lambda i: batches[i % 3], shape, {}, profiled=False)

    tell("one GPU", lambda: of(shape.config.num_layers))
    tell("one GPU, 1 layer a turn", lambda: of(1))


def meshes(shape: Shape) -> None:
    """Every strategy of VARIANTS."""
    options = accepted(CHOSEN)
    for name, variant in VARIANTS.items():
        tell(name, functools.partial(_variant, variant, shape, options))


def _variant(
    variant: Variant, shape: Shape, options: dict[str, Any], unroll: int = NO_LOOP
) -> dict[str, Any]:
    step, state, batch = prepared(variant, shape, unroll)
    return measured(step, state, batch, shape, options)


def trials(shape: Shape) -> None:
    """FSDP under other options of XLA and other numbers of layers a turn."""
    for name, (options, unroll, level) in TRIALS.items():
        jax.config.update("jax_optimization_level", level)
        run = functools.partial(_variant, VARIANTS["FSDP"], shape, accepted(options), unroll)
        tell(name, run)


def plan(shape: Shape) -> None:
    """The planner's first five for two of these devices, each as it says and measured."""
    from jaxinfra.hardware import chips
    from jaxinfra.hardware.detect import lookup
    from parallel.footprint import total
    from parallel.plan import plan as planned

    options = accepted(CHOSEN)
    chip = lookup() or chips.find("H200")
    found = planned(shape.config, chip, 2, 2 * shape.rows * shape.length, shape.length)
    for p in found.fitting[:5]:
        variant = Variant(
            Strategy(p.mesh, p.step.zero, p.step.schedule, p.step.context),
            "full" if p.step.remat else "none", p.step.accumulate,
        )  # fmt: skip
        tell(p.mesh, lambda p=p, variant=variant: _variant(variant, shape, options) | {
            "predicted_s": p.seconds, "predicted_bytes": total(p.memory), "remat": p.step.remat,
            "accumulate": p.step.accumulate})  # fmt: skip


def exchanges(shape: Shape) -> None:
    """Seconds of collectives over two devices, XLA's (NCCL) and rings of messages; float32."""
    two = mesh.make({mesh.Axis.DP: 2})
    cut = PartitionSpec("dp")
    kinds: dict[str, Callable] = {
        "all_reduce": lambda x: jax.lax.psum(x, "dp"),
        "all_gather": lambda x: jax.lax.all_gather(x, "dp", tiled=True),
        "reduce_scatter": lambda x: jax.lax.psum_scatter(x, "dp", tiled=True),
        "ring all_reduce": lambda x: collectives.all_reduce(x, "dp"),
        "ring all_gather": lambda x: collectives.all_gather(x, "dp"),
        "ring reduce_scatter": lambda x: collectives.reduce_scatter(x, "dp"),
    }
    for name, kind in kinds.items():
        out = PartitionSpec() if name == "all_reduce" else cut
        run = jax.jit(jax.shard_map(kind, mesh=two, in_specs=cut, out_specs=out))
        for size in shape.message_bytes:
            local = size // 4 // (2 if "gather" in name else 1)
            x = jnp.arange(2 * local, dtype=jnp.float32) % 1024
            x = jax.device_put(x, NamedSharding(two, cut))
            tell(f"{name} {size}", lambda run=run, x=x: {"seconds": _queued(run, x, shape)})


def _queued(run: Callable, x: Any, shape: Shape) -> list[float]:
    """Seconds a call of calls that are queued and waited for together."""
    calls = shape.calls(x.nbytes)
    jax.block_until_ready(run(x))
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready([run(x) for _ in range(calls)])
        seconds.append((time.perf_counter() - begun) / calls)
    return seconds


def tell(name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """One line for the parent: what was measured, or why not."""
    try:
        told(name, measure())
    except Exception as error:  # one that fails costs the others nothing
        told(name, {"error": f"{type(error).__name__}: {str(error)[:600]}"})


def main() -> None:
    """Runs the part named."""
    shape = SHAPE
    if "--tiny" in sys.argv:
        shape = TINY
        mesh.emulate(1 if sys.argv[1] == "alone" else 2)
    parts = {
        "alone": alone, "meshes": meshes, "plan": plan, "collectives": exchanges, "options": trials,
    }  # fmt: skip
    parts[sys.argv[1]](shape)


if __name__ == "__main__":
    main()
