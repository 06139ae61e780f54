"""A training step compiled for a TPU pod that is not here, on a machine with a CPU.

The TPU compiler (libtpu) needs no TPU: given a topology it compiles, or says how much memory is
missing, and the result tells memory, collectives and what overlaps. Nothing is run. A 70B step for
256 chips takes a minute or two on two cores, because layers are one loop.

    pip install 'jaxinfra[tpu]'
    python -m jaxinfra aot llama-3.1-8b --chip v5e --count 16 --mesh fsdp=16
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxinfra.errors import UserError
from jaxinfra.measure.structure import Memory, memory
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.optimizer import make_optimizer
from jaxinfra.train.step import TrainState
from parallel.census import Collective, census
from parallel.mesh import shardings
from parallel.train import Strategy, build


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled step tells, per device."""

    memory: Memory
    collectives: list[Collective]
    seconds: float  # that compiling took
    program: Any  # the jax.stages.Compiled

    def save(self, path: Path) -> None:
        """Writes the executable; `jax.experimental.serialize_executable` reads it on such chips."""
        from jax.experimental.serialize_executable import serialize

        path.write_bytes(serialize(self.program)[0])

    @property
    def peak(self) -> int:
        """Bytes of memory at once, arguments included; what is donated counts once.

        The compiler's peak: its sum of temporaries counts some of them twice on a TPU.
        """
        return self.memory.peak


def compile_step(
    config: ModelConfig,
    strategy: Strategy,
    places: list[Any],
    *,
    rows: int,
    seq_len: int,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> Compiled:
    """AdamW's step of `rows` x `seq_len` tokens on `places`: `devices(...)` or `jax.devices()`.

    Args:
      options: as in `parallel.train.build`: accumulate, remat, z_loss.

    Raises UserError where the mesh or the batch does not fit, or the step needs more memory than a
    chip has.
    """
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    layout, step, specs = build(strategy, config, optimizer, places, dtype=dtype, **options)
    shapes = jax.eval_shape(lambda p: TrainState.create(p, optimizer), P.abstract(config))
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes, shardings(layout.mesh, specs),
    )  # fmt: skip
    batch = {"tokens": jax.ShapeDtypeStruct((rows, seq_len + 1), jnp.int32)}
    begun = time.perf_counter()
    # Kernels are chosen by the platform of this process, which need not be that of the program.
    with mock.patch.object(jax, "default_backend", lambda: places[0].platform):
        lowered = step.lower(state, batch)
    program = compiled_or_told(lowered)
    return Compiled(
        memory(program), census(program), round(time.perf_counter() - begun, 1), program
    )


def compiled_or_told(lowered: Any) -> Any:
    """The compiled program; a UserError where a chip has too little memory for it."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+[KMG]) of ([\d.]+[KMG]) hbm", str(error))
        told = f"needs {used[1]} of {used[2]}" if used else "needs more memory than a chip has"
        raise UserError(
            f"aot: the step {told} on each device; give fewer rows, more chips or fsdp"
        ) from None


def devices(chip: str, count: int) -> list[Any]:
    """Descriptions of `count` chips of one slice."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server of a cloud
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock file: nothing runs on a chip
    name = f"{chip}:{shape(chip, count)}"
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu").devices
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"aot: {name}: {str(error).splitlines()[0]}; install jaxinfra[tpu], or give a count "
            "that a slice of this chip has"
        ) from None
    return list(found)[:count]


def shape(chip: str, count: int) -> str:
    """The most even slice of `count` chips, as 4x4 (v5e, v6e) or 4x4x8 (v5p)."""
    dims = {"v5e": 2, "v6e": 2, "v5p": 3}.get(chip)
    if dims is None:
        raise UserError(f"aot: no chip {chip!r}; there are v5e, v5p, v6e")
    if count < 4 or count & (count - 1):
        raise UserError(f"aot: count={count}: give a power of two, 4 or more")
    exponents = [0] * dims
    for _ in range(int(math.log2(count))):
        exponents[exponents.index(min(exponents))] += 1
    return "x".join(str(2**e) for e in sorted(exponents, key=lambda e: (e == 0, e)))
