"""What a training run is told. Importing this imports no jax: the command line reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from jaxinfra.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates: `jaxinfra.train.optimizer` builds it from this."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for all, or muon for the matrices inside layers and adam for the rest."""
    learning_rate: float = 1e-3
    """The highest, reached after the warm-up."""
    warmup_steps: int = 20
    """Steps over which the rate rises in a line; a cosine over all other steps follows."""
    final_fraction: float = 0.1
    """The last step's rate as a share of the highest."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    weight_decay: float = 0.1
    """Times the rate; on matrices and embeddings, not on norms and biases."""
    clip_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise UserError(f"optimizer: name={self.name!r}: choose adamw or muon")
        for name in ("learning_rate", "clip_norm", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"optimizer: {name}={getattr(self, name)}: give a positive number")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer: {name}={getattr(self, name)}: give one in [0, 1)")
        for name, most in (("warmup_steps", 2**31), ("weight_decay", 1), ("final_fraction", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"optimizer: {name}={getattr(self, name)}: give one in [0, {most}]")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults train a byte model on Python's library, on any machine."""

    data: str = "stdlib"
    """stdlib (the source of Python's standard library), a text file, a folder of text files or of
    tokens, or hf:OWNER/NAME for a Hugging Face dataset with a column `text`."""
    out: Path = Path("runs/train")
    """Folder for checkpoints, metrics and the trained model."""
    model: str = "tiny"
    """The shape to train from nothing: a preset's name, a config.json or a model folder."""
    finetune: str | None = None
    """A model to start from instead: a short name, Hugging Face id, folder or .gguf file."""
    tokenizer: str | None = None
    """A model to take the tokenizer of; by default that of `finetune`, or bytes."""
    steps: int = 300
    """Steps in all, those before a resume included."""
    batch_size: int = 16
    """Rows a step."""
    seq_len: int = 256
    """Tokens a row."""
    accumulate: int = 1
    """Microbatches a step: the batch is computed in so many parts, one after the other."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser and its schedule."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the computation (parameters are kept in float32); auto: float32 on a CPU."""
    remat: Literal["none", "matmuls", "attention", "full"] = "none"
    """What the backward pass computes again to save memory; full saves most."""
    unroll: int = 0
    """Layers a turn of the loop over them; 0: on a GPU all, where they are no more than 64, else 1.

    Without a loop nothing is copied to stack what each layer keeps for the backward pass."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator (1e-4 in PaLM)."""
    router_bias_update_rate: float = 0.0
    """Of experts: a bias that balances their load without a loss moves by so much a step (0.001 in
    DeepSeek-V3); 0: none. Samples and the model at the end choose experts without it."""
    separate_documents: bool = False
    """Documents that share a row do not see each other."""
    validation: float = 0.02
    """Share of rows held out."""
    eval_every: int = 100
    """Steps between evaluations on held-out rows; 0: none."""
    eval_batches: int = 4
    """Batches an evaluation."""
    sample_every: int = 100
    """Steps between texts written by the model; 0: none."""
    prompt: str = "def "
    """What those texts begin with."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one more is written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints to keep."""
    log_every: int = 10
    """Steps over which tokens/s is averaged."""
    resume: bool = False
    """Continue the run in `out`."""
    seed: int = 0
    """Of the first parameters and of the order of the data."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "eval_batches", "keep",
                     "log_every", "checkpoint_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"train: {name}={getattr(self, name)}: give 1 or more")
        if self.unroll < 0:
            raise UserError(f"train: unroll={self.unroll}: give 1 or more, or 0 to choose")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train: batch_size={self.batch_size} is not a multiple of "
                f"accumulate={self.accumulate}"
            )
        if not 0 <= self.validation < 1:
            raise UserError(f"train: validation={self.validation}: give a share in [0, 1)")
        if self.eval_every < 0 or self.sample_every < 0:
            raise UserError("train: eval_every and sample_every may not be negative")
        if not 0 <= self.z_loss < float("inf"):
            raise UserError(f"train: z_loss={self.z_loss}: give 0 or a positive number")
        if not 0 <= self.router_bias_update_rate < 1:
            raise UserError(
                f"train: router_bias_update_rate={self.router_bias_update_rate}: give one in [0, 1)"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"train: seed={self.seed}: give an integer from 0 to {2**32 - 1}")
