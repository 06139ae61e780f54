"""What a trainer would do and need, from compiling its step; no weights are read.

python -m jaxinfra align dpo --model smollm2-135m --data pairs.jsonl --dry-run
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from rich.console import Console

from align.preferences import rows
from align.trainer import check
from align.trainer_config import TrainerConfig
from align.trainer_losses import make_objective
from align.trainer_mesh import place
from align.trainer_step import begin, make_step
from jaxinfra.model import params as P
from jaxinfra.model import presets
from jaxinfra.model.config import ModelConfig
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.run import dtype_of
from jaxinfra.train.step import TrainState
from jaxinfra.weights.open import read_config
from jaxinfra.weights.pull import pull


def plan(config: TrainerConfig, console: Console | None = None) -> dict[str, float]:
    """Compiles the step of `config` and prints its memory and what the run would do.

    No weights are read. Gives bytes of a device: trained (with the optimiser's moments), donated
    (of that, what the new state takes the place of), frozen, batch, temporary; and tokens a step
    and epochs.
    """
    console = console or Console()
    model, tokenizer = _shape(config)
    check(config, model, tokenizer)
    found, dtype = rows.build(config, tokenizer), dtype_of(config.dtype)
    objective = make_objective(config, model, found.beliefs)
    optimizer = make_optimizer(config.optimizer, config.steps)
    rate = schedule(config.optimizer, config.steps)
    trained, frozen = jax.eval_shape(lambda p: begin(config, model, p), P.abstract(model))
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), frozen)
    state = jax.eval_shape(functools.partial(TrainState.create, optimizer=optimizer), trained)
    placement, where = place(config, model), None
    if placement is not None:
        state = _placed(state, placement.state(state, optimizer))
        frozen = None if frozen is None else _placed(frozen, placement.frozen)
        where = placement.rows
    arrays = dict(found.arrays)
    if objective.reference is not None:
        arrays["reference"] = np.zeros(arrays["lengths"].shape, np.float32)
    data = rows.Batches(arrays, config.batch_size, config.seed, config.validation)
    batch, packed = data.batch_at(0), ()
    if config.pack:
        count, unpacked, full = data.packed_rows(config)
        objective = make_objective(config, model, found.beliefs, rows=count)
        packed = (
            f"packed: {unpacked} sequences a forward pass in {count} rows, {full / count:.0%} of "
            f"them filled in place of {full / unpacked:.0%}: {1 - count / unpacked:.0%} of the "
            "tokens saved",
        )
    step: Any = make_step(config, objective, optimizer, rate, dtype, where)
    memory = step.lower(state, batch, frozen).compile().memory_analysis()
    told = {
        "trained": float(_bytes(state)), "donated": float(memory.alias_size_in_bytes),
        "frozen": float(_bytes(frozen)), "batch": float(_bytes(batch)),
        "temporary": float(memory.temp_size_in_bytes),
        "tokens": float(np.sum(found.arrays["sizes"])) * config.batch_size / len(found),
        "epochs": config.steps * config.batch_size / data.training,
    }  # fmt: skip
    total = sum(told[name] for name in ("trained", "frozen", "batch", "temporary"))
    reference = " with a reference that is computed before the first" if objective.reference else ""
    part = config.batch_size // config.accumulate
    for line in (
        f"{config.method}: {found.told(config.max_length)}, {data.held_out} held out",
        f"{config.steps} steps of {config.batch_size} rows in parts of {part}{reference}: "
        f"{told['epochs']:.1f} epochs, {told['tokens']:,.0f} tokens a step",
        f"trained and the optimiser's {_size(told['trained'])}, frozen {_size(told['frozen'])}, "
        f"a batch {_size(told['batch'])}, while a step runs {_size(told['temporary'])}",
        *packed,
        f"memory in all {_size(total)}, {dtype.name}, on {jax.devices()[0].device_kind}"
        + (f", each of the mesh {config.mesh}" if config.mesh else ""),
    ):
        console.print(line, highlight=False, soft_wrap=True)
    return told


def _shape(config: TrainerConfig) -> tuple[ModelConfig, Tokenizer]:
    """The model's configuration and the tokenizer, with no weights read."""
    source = config.tokenizer or config.finetune
    tokenizer = Tokenizer.byte_level()
    if source is not None:
        path = pull(source)
        files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
        tokenizer = Tokenizer.from_gguf(files[0]) if files else Tokenizer.from_folder(path)
    if config.finetune is not None:
        return read_config(pull(config.finetune)), tokenizer
    return presets.find(config.model), tokenizer


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree, places,
    )  # fmt: skip


def _bytes(tree: Any) -> int:
    """On one device."""

    def one(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
