"""What a trainer on fixed data is told: one dataclass a method, and the flags of its command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal, get_args

from align.losses import ContrastiveLoss, PreferenceLoss
from jaxinfra.errors import UserError
from jaxinfra.train.config import OptimizerConfig

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
FULL = OptimizerConfig(learning_rate=1e-5, warmup_steps=10, weight_decay=0.0, b2=0.999)
REWARD = dataclasses.replace(FULL, learning_rate=1e-4)
PREFERENCE, SIMPO = PreferenceLoss(), ContrastiveLoss()
PAIRS = dataclasses.replace(FULL, learning_rate=1e-6)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside frozen parameters (arXiv 2106.09685): W + alpha / rank A B."""

    rank: int = 0
    """Of the adapters; 0 trains all parameters and makes no adapters."""
    alpha: float = 16.0
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[Target, ...] = get_args(Target)
    """The matrices of each layer that have an adapter."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora: rank={self.rank}: give 1 or more, or 0 for none")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"lora: alpha={self.alpha}: give a positive number")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError("lora: targets: name each matrix once, and at least one")
        if other := set(self.targets) - set(get_args(Target)):
            known = ", ".join(get_args(Target))
            raise UserError(f"lora: targets={sorted(other)}: choose of {known}")


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """What all trainers are told. A step takes `batch_size` rows of the data."""

    method: ClassVar[str]

    data: str = "synthetic"
    """A .jsonl file, hf:OWNER/NAME for a Hugging Face dataset (its split train), or synthetic."""
    out: Path = Path("runs/align")
    """Folder for checkpoints, metrics and the trained model."""
    model: str = "tiny"
    """The shape to train from nothing: a preset's name, a config.json or a model folder."""
    finetune: str | None = None
    """A model to start from instead: a short name, Hugging Face id, folder or .gguf file."""
    tokenizer: str | None = None
    """A model to take the tokenizer of; by default that of `finetune`, or bytes."""
    lora: LoRA = LoRA()
    """Train adapters only."""
    steps: int = 100
    """Steps in all, those before a resume included."""
    batch_size: int = 16
    """Rows (examples, pairs) a step."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other."""
    max_length: int = 512
    """Tokens of a prompt with its answer; longer answers are cut, and the run says how many."""
    optimizer: OptimizerConfig = FULL
    """The optimiser and its schedule."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the computation; what is trained is kept in float32. auto: float32 on a CPU."""
    remat: Literal["none", "matmuls", "attention", "full"] = "none"
    """What the backward pass computes again to save memory; full saves most."""
    pack: bool = False
    """Lay short sequences into shared rows: the same losses without what padding costs."""
    mesh: str | None = None
    """Sizes of axes, as in dp=2,fsdp=2,tp=2; by default one device."""
    emulate: int = 0
    """Run on so many emulated CPU devices."""
    validation: float = 0.0
    """Share of rows held out."""
    eval_every: int = 50
    """Steps between evaluations on held-out rows; 0: none."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one more is written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints to keep."""
    log_every: int = 10
    """Steps over which tokens/s is averaged."""
    resume: bool = False
    """Continue the run in `out`."""
    seed: int = 0
    """Of first parameters, adapters and the order of the data."""
    dry_run: bool = False
    """Compile the step, print its memory and the plan, and train nothing."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{self.method}: {name}={getattr(self, name)}: give 1 or more")
        if self.max_length < 2:
            raise UserError(f"{self.method}: max_length={self.max_length}: give 2 or more")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"{self.method}: batch_size={self.batch_size} is not a multiple of "
                f"accumulate={self.accumulate}"
            )
        if self.pack and self.mesh:
            raise UserError(f"{self.method}: pack lays sequences across a mesh's rows; leave one")
        if not 0 <= self.validation < 1:
            raise UserError(f"{self.method}: validation={self.validation}: give a share in [0, 1)")
        if self.eval_every < 0:
            raise UserError(f"{self.method}: eval_every may not be negative")
        if not 0 <= self.emulate <= 512:
            raise UserError(f"{self.method}: emulate={self.emulate}: give 1 to 512 devices")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"{self.method}: seed={self.seed}: give one from 0 to {2**32 - 1}")

    def __call__(self) -> None:
        """Trains so, or tells the plan: what the command does."""
        if self.emulate:
            import jax

            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", self.emulate)
        if self.dry_run:
            from align.trainer_plan import plan

            plan(self)
        else:
            from align.trainer import train

            train(self)


@dataclasses.dataclass(frozen=True)
class SFT(TrainerConfig):
    """Learns answers word for word: likelihood, or dynamic fine-tuning."""

    method = "sft"
    loss: Literal["nll", "dft"] = "nll"
    """nll: -log p a token. dft: the same times p without its gradient (arXiv 2508.05629)."""


@dataclasses.dataclass(frozen=True)
class Reward(TrainerConfig):
    """Trains a reward model on pairs (Bradley and Terry)."""

    method = "reward"
    optimizer: OptimizerConfig = REWARD
    centre: float = 0.0
    """Weight of the squared sum of a pair's rewards: TRL's center_rewards_coefficient, as 0.01."""


@dataclasses.dataclass(frozen=True)
class DPO(TrainerConfig):
    """Prefers chosen to rejected answers, held by a reference: DPO and its family."""

    method = "dpo"
    optimizer: OptimizerConfig = PAIRS
    loss: PreferenceLoss = PREFERENCE
    """Which of the family."""
    nll_coef: float = 0.0
    """Weight of the chosen answers' likelihood a token (RPO; TRL's loss type sft)."""
    tail_weight: float = 1.0
    """What tokens past the shorter answer's length weigh (LD-DPO; TRL's ld_alpha)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tail_weight <= 1:
            raise UserError(f"dpo: tail_weight={self.tail_weight}: give one in [0, 1]")


@dataclasses.dataclass(frozen=True)
class KTO(TrainerConfig):
    """Learns from single answers marked good or bad (Kahneman and Tversky)."""

    method = "kto"
    optimizer: OptimizerConfig = PAIRS
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = 0.1
    """How strongly the reference holds."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class ORPO(TrainerConfig):
    """Learns chosen answers and lowers the odds of rejected ones, with no reference."""

    method = "orpo"
    optimizer: OptimizerConfig = PAIRS
    beta: float = 0.1
    """Weight of the odds ratio."""


@dataclasses.dataclass(frozen=True)
class SimPO(TrainerConfig):
    """Prefers by mean log-probability, with no reference: SimPO, CPO, AlphaPO."""

    method = "simpo"
    optimizer: OptimizerConfig = PAIRS
    loss: ContrastiveLoss = SIMPO
    """Which of them; CPO is kind sigmoid with nll_coef 1."""


@dataclasses.dataclass(frozen=True)
class GDPO(TrainerConfig):
    """Keeps a population's mixture of beliefs: a belief first, preferences given the belief."""

    method = "gdpo"
    optimizer: OptimizerConfig = PAIRS
    loss: PreferenceLoss = PREFERENCE
    """Of the pairs, given the belief."""


METHODS: dict[str, type[TrainerConfig]] = {
    config.method: config for config in (SFT, Reward, DPO, KTO, ORPO, SimPO, GDPO)
}
