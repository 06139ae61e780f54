"""The training run on text: data, step, evaluation, samples and the model at its end.

What every run has, whatever it trains, is `jaxinfra.train.run`.

    python -m jaxinfra train --data stdlib --steps 300
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.generate import Sampling, generate
from jaxinfra.hardware.detect import detect
from jaxinfra.loading import load
from jaxinfra.model import params as P
from jaxinfra.model import presets
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.counts import train_flops_per_token
from jaxinfra.model.params import Params
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.checkpoint import Checkpoints
from jaxinfra.train.config import TrainConfig
from jaxinfra.train.data import Data, open_data
from jaxinfra.train.metrics import Meter, read_metrics
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.run import Run, dtype_of, due
from jaxinfra.train.step import TrainState, make_evaluation, make_step
from jaxinfra.train.tokens import fingerprint
from jaxinfra.weights import safetensors
from jaxinfra.weights.pull import pull

_SAMPLE_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves: the state after its last step, its rows of metrics, its model folder."""

    model_config: ModelConfig
    state: TrainState = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    rows: list[dict[str, Any]] = dataclasses.field(repr=False)
    model: Path | None  # for `jaxinfra.load`; None when the run was stopped before its end


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Trains as `config` says, in `config.out`: checkpoints, metrics.jsonl, and at the end `model`.

    Args:
      on_row: receives each step's row of metrics (`jaxinfra.train.metrics`), two steps late.

    Raises UserError where `config` asks for what is not there or does not fit together, where
    `config.out` holds a run and `config.resume` is not set, and where the disk is full.
    """
    if config.router_bias_update_rate:
        raise UserError(
            "train: router_bias_update_rate: this step has no bias of the router; train on a mesh, "
            "of which dp=1 is one device"
        )
    return _Run(config, console or Console(), on_row or (lambda row: None)).run()


class _Run(Run):
    """One run, taken apart into what is done once, every step, and now and then."""

    def __init__(self, config: TrainConfig, console: Console, on_row: Callable) -> None:
        super().__init__(config, console, on_row)
        self.dtype = dtype_of(config.dtype)
        self.model_config, self.tokenizer, make_params = model_of(config)
        self.tokenizer.check(self.model_config)
        if config.seq_len > self.model_config.max_seq_len:
            raise UserError(
                f"train: seq_len={config.seq_len} exceeds the model's max_seq_len="
                f"{self.model_config.max_seq_len}; give a smaller one"
            )
        self.prompt = self.tokenizer.encode(config.prompt)
        if config.sample_every and not 0 < len(self.prompt) < self.model_config.max_seq_len:
            raise UserError(
                f"train: prompt: {len(self.prompt)} tokens leave no room in the model's "
                f"max_seq_len={self.model_config.max_seq_len}; give another or sample_every=0"
            )
        self.data = open_data(config, self.tokenizer)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        about = _about(config, self.dtype, self.model_config, self.tokenizer, self.data)
        self.unroll = layers_a_turn(config.unroll, self.model_config.num_layers)
        how = {"steps": config.steps, "remat": config.remat, "unroll": self.unroll}
        self.checkpoints = Checkpoints(self.out / "checkpoints", about, config.keep, how)
        self.state = self._start(make_params)
        options = {"dtype": self.dtype, "remat": config.remat, "unroll": self.unroll}
        self.step = make_step(
            self.model_config, self.optimizer, schedule(config.optimizer, config.steps),
            accumulate=config.accumulate, z_loss=config.z_loss, **options,
        )  # fmt: skip
        self.evaluate = make_evaluation(self.model_config, **options)
        self.meter = Meter(
            config.log_every,
            train_flops_per_token(self.model_config, config.seq_len),
            detect().flops.get(self.dtype.name),
        )

    def _start(self, make_params: Callable[[], Params]) -> TrainState:
        create = functools.partial(TrainState.create, optimizer=self.optimizer)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(create, P.abstract(self.model_config)),
        )
        if self.config.resume:
            return self.restored(like)
        return jax.jit(create, donate_argnums=0)(make_params())

    def run(self) -> Result:
        model = self.train()
        rows = read_metrics(self.out / "metrics.jsonl")
        return Result(self.model_config, self.state, self.tokenizer, rows, model)

    def introduce(self) -> None:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        row = f"{self.config.batch_size} x {self.config.seq_len} tokens a step"
        self.console.print(
            f"{count / 1e6:.1f} M parameters, {len(self.data.file.ids) / 1e6:.1f} M tokens, {row}, "
            f"{self.dtype.name}" + (f", from step {self.first}" if self.first else ""),
            highlight=False,
        )

    def now_and_then(self, done: int) -> dict[str, Any]:
        """An evaluation, a sample."""
        more: dict[str, Any] = {}
        if self.data.held_out and due(done, self.config.eval_every, self.config.steps):
            batches = self.data.validation_batches(self.config.eval_batches)
            sums = jax.device_get([self.evaluate(self.state.params, batch) for batch in batches])
            more["validation_nll"] = float(sum(s for s, _ in sums) / sum(n for _, n in sums))
            line = f"step {done}: held-out loss {more['validation_nll']:.4f}"
            self.console.print(line, highlight=False)
        if due(done, self.config.sample_every, self.config.steps):
            more["sample"] = self._sample(done)
            self.console.print(f"step {done} writes:", style="bold", highlight=False)
            self.console.print(more["sample"], markup=False, highlight=False)
        return more

    def _sample(self, seed: int) -> str:
        room = self.model_config.max_seq_len - len(self.prompt)
        params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), self.state.params)
        made = generate(
            params, self.model_config, [self.prompt], max_new_tokens=min(_SAMPLE_TOKENS, room),
            sampling=Sampling(temperature=0.8, top_p=0.95, seed=seed),
            stop_ids=self.tokenizer.eos_ids,
        )  # fmt: skip
        return self.tokenizer.decode([*self.prompt, *made.tokens[0]])

    def export(self) -> Path:
        """Writes `out/model`, in place of an earlier one once it is whole."""
        model, new = self.out / "model", self.out / ".model.new"
        shutil.rmtree(new, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self.out) as words:
            self.tokenizer.save(words)
            safetensors.save(new, self.state.params, self.model_config, tokenizer_from=words)
        shutil.rmtree(model, ignore_errors=True)
        os.replace(new, model)
        return model


def layers_a_turn(asked: int, layers: int) -> int:
    """Layers a turn of the loop over them, as asked, or chosen where 0 is asked.

    On two H200s the Qwen3-1.7B shape (28 layers) trained 1.18 times as fast without a loop as with
    4 layers a turn, in half the memory; compiling took 15 s for 5. More than 64 layers keep theirs.
    """
    if asked:
        return min(asked, layers)
    return layers if jax.default_backend() in ("gpu", "cuda") and layers <= 64 else 1


def model_of(config: TrainConfig) -> tuple[ModelConfig, Tokenizer, Callable[[], Params]]:
    """The shape, the tokenizer, and how to make the first parameters."""
    start = None if config.finetune is None else load(config.finetune)
    if config.tokenizer is not None:
        tokenizer = Tokenizer.from_path(pull(config.tokenizer))
    else:
        tokenizer = start.tokenizer if start else Tokenizer.byte_level()
    if start is not None:
        return start.config, tokenizer, lambda: start.params
    model_config = presets.find(config.model)
    init = jax.jit(P.init, static_argnums=1)
    return model_config, tokenizer, lambda: init(jax.random.key(config.seed), model_config)


def _about(
    config: TrainConfig, dtype: Any, model: ModelConfig, tokenizer: Tokenizer, data: Data
) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run."""
    about = {
        "model": model.to_hf(),
        "tokenizer": fingerprint(tokenizer),
        "data": {
            "sha256": data.file.sha256,
            "validation": config.validation,
            "separate_documents": config.separate_documents,
            "seed": config.seed,
        },
        "batch": {
            "batch_size": config.batch_size,
            "seq_len": config.seq_len,
            "accumulate": config.accumulate,
        },
        "optimizer": dataclasses.asdict(config.optimizer),
        "z_loss": config.z_loss,
        "dtype": dtype.name,
    }
    if config.router_bias_update_rate:  # runs from before it was there can go on without it
        about["router_bias_update_rate"] = config.router_bias_update_rate
    return about
