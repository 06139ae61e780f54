"""Trainers on fixed data: sft, reward, dpo, kto, orpo, simpo, gdpo: one run with seven losses.

    python -m jaxinfra align dpo --data pairs.jsonl --finetune smollm2-135m --lora.rank 16

What the reference gives (dpo, kto, gdpo) is computed before the first step and kept in the run's
folder, so that no second model is in memory while training. The folder has the rest of what a run
has (`jaxinfra.train.run`); `model` in it is for `jaxinfra.load` and transformers, `adapter` for
PEFT, and a reward model's head is `model/value_head.npz`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from align import lora
from align.preferences import rows
from align.trainer_config import TrainerConfig
from align.trainer_losses import make_objective
from align.trainer_mesh import place
from align.trainer_step import begin, make_evaluation, make_step, merged
from align.value_model import ValueModel, save_head
from jaxinfra.errors import UserError
from jaxinfra.files import write_file
from jaxinfra.hardware.detect import detect
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.counts import train_flops_per_token
from jaxinfra.model.params import Params
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.checkpoint import Checkpoints, checksum
from jaxinfra.train.loop import model_of
from jaxinfra.train.metrics import Meter, read_metrics
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.run import Run, dtype_of, due
from jaxinfra.train.step import TrainState
from jaxinfra.train.tokens import fingerprint
from jaxinfra.weights import safetensors

_OF_THE_RUN = {
    "data", "out", "model", "finetune", "tokenizer", "steps", "remat", "eval_every", "keep",
    "checkpoint_every", "log_every", "resume", "dry_run", "mesh", "emulate", "pack",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves: its state, what was frozen beside it, its rows of metrics, its model."""

    config: TrainerConfig
    model_config: ModelConfig
    state: TrainState = dataclasses.field(repr=False)
    frozen: Params | None = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    rows: list[dict[str, Any]] = dataclasses.field(repr=False)
    model: Path | None  # for `jaxinfra.load`; None when the run was stopped before its end

    @property
    def policy(self) -> Params | ValueModel:
        """The trained model in float32, adapters merged."""
        return merged(self.state.params, self.frozen, self.config.lora)


def train(
    config: TrainerConfig,
    *,
    console: Console | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Trains as `config` says, in `config.out`.

    Args:
      on_row: receives each step's row of metrics, two steps late.

    Raises UserError on data that is not what the method learns from, on a tokenizer, adapters or a
    length that do not fit the model, and as `jaxinfra.train.loop.train` does.
    """
    return _Run(config, console or Console(), on_row or (lambda row: None)).run()


class _Run(Run):
    """One run of a trainer."""

    config: TrainerConfig
    frozen: Params | None

    def __init__(self, config: TrainerConfig, console: Console, on_row: Callable) -> None:
        super().__init__(config, console, on_row)
        self.dtype = dtype_of(config.dtype)
        self.model_config, self.tokenizer, make_params = model_of(config)  # pyright: ignore
        check(config, self.model_config, self.tokenizer)
        self.placement = place(config, self.model_config)
        self.rows = rows.build(config, self.tokenizer)
        self.objective = make_objective(config, self.model_config, self.rows.beliefs)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        rate = schedule(config.optimizer, config.steps)
        params, arrays = make_params(), dict(self.rows.arrays)
        if self.placement is not None:
            params = jax.device_put(params, self.placement.frozen)
        about = _about(config, self.model_config, self.tokenizer, self.rows, params, self.dtype)
        how = {"steps": config.steps, "remat": config.remat, "mesh": config.mesh,
               "pack": config.pack}  # fmt: skip
        self.checkpoints = Checkpoints(self.out / "checkpoints", about, config.keep, how)
        if self.objective.reference is not None:
            arrays["reference"] = self._reference(params, about)
        self.data = rows.Batches(arrays, config.batch_size, config.seed, config.validation)
        self.state = self._start(params)
        where = None if self.placement is None else self.placement.rows
        packed, self.packed = self.objective, ""
        if config.pack:
            count, unpacked, full = self.data.packed_rows(config)
            packed = make_objective(config, self.model_config, self.rows.beliefs, rows=count)
            self.packed = f", {unpacked} sequences a pass in {count}, {full / count:.0%} filled"
        step = make_step(config, packed, self.optimizer, rate, self.dtype, where)
        self.step = lambda state, batch: step(state, batch, self.frozen)
        self.evaluate = make_evaluation(config, self.objective, self.dtype)
        self.meter = Meter(
            config.log_every,
            train_flops_per_token(self.model_config, arrays["tokens"].shape[2]),
            detect().flops.get(self.dtype.name),
        )

    def _reference(self, params: Params, about: dict[str, Any]) -> np.ndarray:
        """What the model gives before its first step for every row [M, k]: from a file, or now."""
        file = self.out / "reference.npz"
        identity = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        if file.exists():
            with np.load(file) as stored:
                if str(stored["identity"]) == identity:
                    return stored["reference"]
        size = max(1, self.config.batch_size // self.config.accumulate)
        compute = jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)
        assert self.objective.reference is not None
        of_batch = jax.jit(self.objective.reference)
        found = []
        for start in range(0, len(self.rows), size):
            place = np.minimum(np.arange(start, start + size), len(self.rows) - 1)
            batch = {name: array[place] for name, array in self.rows.arrays.items()}
            found.append(np.asarray(of_batch(compute, batch)))
        reference = np.concatenate(found)[: len(self.rows)]
        stream = io.BytesIO()
        np.savez(stream, reference=reference, identity=identity)
        write_file(file, stream.getvalue())
        return reference

    def _start(self, params: Params) -> TrainState:
        """The state before the first step, or the one that was saved; sets what is frozen."""
        trained, frozen = begin(self.config, self.model_config, params)
        if frozen is not None:
            frozen = jax.tree.map(lambda leaf: leaf.astype(self.dtype), frozen)
        self.frozen = frozen
        create: Any = functools.partial(TrainState.create, optimizer=self.optimizer)
        like = jax.eval_shape(create, trained)
        if self.placement is None:
            place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            places = jax.tree.map(lambda _: place, like)
        else:
            places = self.placement.state(like, self.optimizer)
        if self.config.resume:
            like = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                like, places,
            )  # fmt: skip
            return self.restored(like)
        if self.placement is None:
            return jax.jit(create, donate_argnums=0)(trained)
        trained = jax.device_put(trained, places.params)
        return jax.jit(create, out_shardings=places)(trained)

    def run(self) -> Result:
        model = self.train()
        metrics = read_metrics(self.out / "metrics.jsonl")
        return Result(
            self.config, self.model_config, self.state, self.frozen, self.tokenizer, metrics, model
        )

    def introduce(self) -> None:
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        frozen = sum(leaf.size for leaf in jax.tree.leaves(self.frozen))
        self.console.print(
            f"{trained / 1e6:.2f} M parameters are trained"
            + (f", {frozen / 1e6:.1f} M frozen" if frozen else "")
            + f"; {self.rows.told(self.config.max_length)}; {self.config.batch_size} rows a step"
            + f"{self.packed}, {self.dtype.name}"
            + (f", from step {self.first}" if self.first else ""),
            highlight=False,
        )

    def now_and_then(self, done: int) -> dict[str, Any]:
        """An evaluation on held-out rows."""
        if not (self.data.held_out and due(done, self.config.eval_every, self.config.steps)):
            return {}
        found = jax.device_get(
            [
                self.evaluate(self.state.params, batch, self.frozen)
                for batch in self.data.validation_batches()
            ]
        )
        means = {f"eval_{name}": float(np.mean([m[name] for m in found])) for name in found[0]}
        self.console.print(f"step {done}: held-out loss {means['eval_loss']:.4f}", highlight=False)
        return means

    def export(self) -> Path:
        """Writes `out/model`, and `out/adapter`, in place of earlier ones once they are whole."""
        config = self.config
        whole = merged(self.state.params, self.frozen, config.lora)
        params = whole.trunk if isinstance(whole, ValueModel) else whole
        model, new = self.out / "model", self.out / ".model.new"
        shutil.rmtree(new, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self.out) as words:
            self.tokenizer.save(words)
            safetensors.save(new, params, self.model_config, tokenizer_from=words)
        if isinstance(whole, ValueModel):
            save_head(new, whole)
        if config.lora.rank:
            adapter, fresh = self.out / "adapter", self.out / ".adapter.new"
            shutil.rmtree(fresh, ignore_errors=True)
            lora.save(
                fresh, self.state.params.adapters, config.lora, self.model_config, config.finetune
            )
            _replace(fresh, adapter)
        _replace(new, model)
        return model


def check(config: TrainerConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError where tokenizer, length or adapters do not fit the model."""
    tokenizer.check(model)
    if config.max_length > model.max_seq_len:
        raise UserError(
            f"{config.method}: max_length={config.max_length} exceeds the model's max_seq_len="
            f"{model.max_seq_len}; give a smaller one"
        )
    if config.lora.rank:
        jax.eval_shape(lambda: lora.init(jax.random.key(0), model, config.lora))


def _about(
    config: TrainerConfig, model: ModelConfig, tokenizer: Tokenizer, data: rows.Rows,
    params: Params, dtype: Any,
) -> dict[str, Any]:  # fmt: skip
    """What must be the same for a resumed run to be the same run."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OF_THE_RUN}
    return settings | {
        "method": config.method, "model": model.to_hf(), "tokenizer": fingerprint(tokenizer),
        "data": data.sha256, "start": int(checksum(params)), "dtype": dtype.name,
    }  # fmt: skip


def _replace(new: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    os.replace(new, old)
