"""The commands of this layer. Importing this imports no jax: each command does when it runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from jaxinfra.errors import UserError
from jaxinfra.train.config import TrainConfig
from parallel.census import Collective


def train(
    config: Annotated[TrainConfig, arg(name="")],
    *,
    mesh: str | None = None,
    zero: int = 0,
    schedule: str = "1f1b",
    context: str = "ring",
    sequence: bool = True,
    capacity_factor: float | None = None,
    dispatch: str = "padded",
    precision: str = "",
    offload: bool = False,
    emulate: int = 0,
    coordinator: str | None = None,
    hosts: int = 0,
    host: int = -1,
    join_timeout: int = 300,
) -> None:
    """Trains a model, on one device or on a mesh of many, of one host or of several.

    Args:
      mesh: sizes of axes, as in dp=2,tp=2,pp=2 (also fsdp, ep, cp); by default one device.
      zero: what dp cuts: 1 the optimiser's moments, 2 gradients too; fsdp cuts parameters as well.
      schedule: of the pipeline: gpipe, 1f1b, eager-1f1b, interleaved (two chunks a stage), zb-h1;
        microbatches are --accumulate.
      context: under cp: ring, gather, ulysses or usp.
      sequence: under tp: positions are cut between its matrices.
      capacity_factor: under ep: room of experts' queues; by default no token is dropped.
      dispatch: of tokens to experts: padded, ragged or ring.
      precision: float16 (with a loss scale), float8 or float8-delayed; by default that of --dtype.
      offload: layers' inputs wait in the host's memory for the backward pass.
      emulate: run on so many emulated CPU devices (of each host).
      coordinator: of several hosts: HOST:PORT of the first, or auto (Slurm, Kubernetes, TPU, MPI).
      hosts: how many there are.
      host: which this is, from 0.
      join_timeout: seconds to wait for the others.
    """
    if emulate:
        from parallel.mesh import emulate as emulated

        emulated(emulate)
    if coordinator is not None:
        from parallel.hosts import join

        join(coordinator, hosts, host, timeout=join_timeout)
    if mesh is None and not config.router_bias_update_rate:
        from jaxinfra.train.loop import train as train_on_one

        train_on_one(config)
        return
    from parallel.train import Strategy
    from parallel.train import train as train_on_mesh

    train_on_mesh(
        config,
        Strategy(
            mesh or "dp=1", zero, schedule, context, sequence, capacity_factor, dispatch, precision,
            offload,
        ),
    )  # fmt: skip


def schedule(
    name: Positional[str], /, *, stages: int = 4, microbatches: int = 8, chunks: int = 2
) -> None:
    """Draws a pipeline schedule and tells its bubble, stash and traffic.

    Args:
      name: gpipe, 1f1b, eager-1f1b, interleaved or zb-h1.
      stages: of the pipeline.
      microbatches: of a step.
      chunks: pieces of the model a stage, for interleaved.
    """
    from parallel.pipeline.draw import text
    from parallel.pipeline.schedule import make
    from parallel.pipeline.simulate import simulate

    table = make(name, stages, microbatches, chunks)
    found = simulate(table)
    print(f"{table}\n{text(table)}")
    print(f"bubble {found.bubble:.1%}, in one program {found.lockstep_bubble:.1%}; ", end="")
    print(f"inputs kept {list(found.stash)}; {found.messages} messages in {len(table.table)} ticks")


def plan(
    model: Positional[str],
    /,
    *,
    chip: str,
    count: int,
    tokens: str = "4M",
    seq_len: int = 4096,
    top: int = 5,
    verify: bool = False,
) -> None:
    """Ranks the meshes for a training step: memory, messages, predicted time; why others fail.

    Args:
      model: a preset, a config.json or a model's folder.
      chip: of the table of `jaxinfra roofline`, as v5p or H200.
      count: chips, a power of two.
      tokens: of a step, as 4M (2**20 each) or 512K.
      seq_len: tokens a row.
      top: meshes to list.
      verify: compile the best (v5e, v5p, v6e) and compare memory and messages with the program's.
    """
    from jaxinfra.hardware import chips
    from jaxinfra.model import presets
    from parallel import plan as planner
    from parallel.plan_view import compared, table

    config = presets.find(model)
    found = planner.plan(config, chips.find(chip), count, _number(tokens), seq_len)
    for text in table(found, top):
        print(text)
    if verify and found.fitting:
        for text in compared(config, found.fitting[0], chip, count):
            print(text)


def _number(text: str) -> int:
    """4194304 of "4M", with K and M powers of two."""
    unit = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal() or not int(digits):
        raise UserError(f"tokens={text!r}: give a number, as 4M, 512K or 65536")
    return int(digits) * unit


def aot(
    model: Positional[str],
    /,
    *,
    mesh: str,
    chip: str = "v5p",
    count: int = 16,
    rows: int = 0,
    seq_len: int = 4096,
    accumulate: int = 1,
    zero: int = 0,
    schedule: str = "1f1b",
    context: str = "ring",
    dispatch: str = "padded",
    decode: bool = False,
    save: Path | None = None,
) -> None:
    """Compiles a training or decode step for TPUs that are not here; tells memory and collectives.

    Args:
      model: a preset, a config.json or a model's folder.
      mesh: sizes of axes, as in fsdp=64,tp=4.
      chip: v5e, v5p or v6e.
      count: chips of the slice, a power of two.
      rows: of a step; by default one a chip.
      seq_len: tokens a row.
      accumulate: parts of the batch, or microbatches of the pipeline.
      zero: as for train.
      schedule: as for train.
      context: as for train.
      dispatch: as for train.
      decode: one token for so many rows, with room for --seq-len tokens each, over dp and tp.
      save: a file for the executable.
    """
    from jaxinfra.model import presets
    from parallel.aot import compile_step, devices
    from parallel.aot_decode import compile_decode
    from parallel.census import overlap
    from parallel.train import Strategy

    config, places = presets.find(model), devices(chip, count)
    if decode:
        found = compile_decode(config, mesh, places, rows=rows or count, seq_len=seq_len)
    else:
        strategy = Strategy(mesh, zero, schedule, context, dispatch=dispatch)
        found = compile_step(
            config, strategy, places, rows=rows or count, seq_len=seq_len, accumulate=accumulate
        )
    m = found.memory
    print(f"{model} on {count} {chip}, {mesh}: compiled in {found.seconds} s")
    print(
        f"memory of a chip: {found.peak / 1e9:.2f} GB, of that {m.arguments / 1e9:.2f} "
        f"arguments; {m.aliased / m.outputs:.1%} of what is new takes the old one's place"
    )
    _print_collectives(found.collectives)
    under, products = overlap(found.program.as_text())
    print(f"matrix products and kernels under a message: {under} of {products}")
    if save is not None:
        found.save(save)
        print(f"wrote {save}")


def census(
    model: Positional[str],
    /,
    *,
    mesh: str,
    rows: int = 0,
    seq_len: int = 128,
    accumulate: int = 1,
    zero: int = 0,
    schedule: str = "1f1b",
    context: str = "ring",
    emulate: int = 0,
) -> None:
    """Tells the collectives of a compiled training step: where, how often, how many bytes.

    Args:
      model: a preset, a config.json or a model's folder.
      mesh: sizes of axes, as in dp=2,tp=4.
      rows: of a step; by default one a device.
      seq_len: tokens a row.
      accumulate: parts of the batch, or microbatches of the pipeline.
      zero: as for train.
      schedule: as for train.
      context: as for train.
      emulate: compile for so many emulated CPU devices.
    """
    if emulate:
        from parallel.mesh import emulate as emulated

        emulated(emulate)
    import jax
    import jax.numpy as jnp

    from jaxinfra.model import presets
    from parallel.aot import compile_step
    from parallel.train import Strategy

    places = jax.devices()
    dtype = jnp.float32 if places[0].platform == "cpu" else jnp.bfloat16
    found = compile_step(
        presets.find(model), Strategy(mesh, zero, schedule, context), places, dtype=dtype,
        rows=rows or len(places) * accumulate, seq_len=seq_len, accumulate=accumulate,
    )  # fmt: skip
    _print_collectives(found.collectives)


def _print_collectives(collectives: list[Any]) -> None:
    """Those that are alike in one line; messages of less than a KiB in one line at the end."""
    alike = Counter((c.op, c.depth, c.group, c.executed, c.bytes) for c in collectives)
    print(
        f"{'collective':20} {'loops':>5} {'devices':>7} {'a step':>7} {'MB each':>9} {'MB sent':>9}"
    )
    small = 0
    for (op, depth, group, executed, size), count in sorted(alike.items(), key=lambda i: i[0]):
        if size < 1024:
            small += count * executed
            continue
        sent = count * Collective(op, depth, executed, size, group).sent
        print(
            f"{op:20} {depth:5} {group:7} {count * executed:7} {size / 1e6:9.3f} {sent / 1e6:9.2f}"
        )
    total = sum(c.sent for c in collectives)
    print(f"{small} of less than 1 KiB; in all a device sends {total / 1e6:.2f} MB a step")
