"""What a run by reward is told: one dataclass a method, and the flags of its command.

jaxinfra align grpo --task spell_backward --steps 80
jaxinfra align ppo --loop host --dry-run
jaxinfra rollouts runs/grpo
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from tyro.conf import Positional

from align.config import ADAM, RLConfig
from align.system.config import SystemConfig
from jaxinfra.errors import UserError
from jaxinfra.train.config import OptimizerConfig

WARM = OptimizerConfig(learning_rate=3e-3, warmup_steps=10, final_fraction=0.1)
SYNCHRONOUS = SystemConfig()
BY_GROUP, LEAVE_ONE_OUT = RLConfig(), RLConfig(algorithm="rloo")
WITH_CRITIC = RLConfig(
    algorithm="ppo", prompts=128, group_size=1, epochs=2, minibatches=2, lam=1.0, value_coef=0.5,
    optimizer=dataclasses.replace(ADAM, b2=0.999),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """One run: a tiny policy sees some answers, and then learns by reward alone."""

    method: ClassVar[str]
    algorithms: ClassVar[tuple[str, ...]]

    task: str = "chain_sum"
    """What is rewarded: chain_sum, spell_backward or number_sorting."""
    easy: bool = False
    """Problems of the task's easy setting."""
    out: Path = Path("runs/rl")
    """Folder for metrics, records, checkpoints and the trained model."""
    policy: Path | None = None
    """A model's folder to begin with; by default a policy of two layers with a warm start."""
    finetune: str | None = None
    """A model that speaks, by short name, Hugging Face id, folder or .gguf file: the task is put to
    it in words and its text is scored (chain_sum, products or spell_backward; answers of
    rl.max_new_tokens tokens; every loop but jit)."""
    examples: int = 0
    """Of finetune: problems with their answers that stand before each question."""
    warm_steps: int = 200
    """Steps of supervised learning before the first reward, where there is no `policy`."""
    problems: int = 4096
    """Of the task, drawn once."""
    steps: int = 100
    """Steps in all, those before a resume included."""
    rl: RLConfig = BY_GROUP
    """The algorithm."""
    loop: Literal["jit", "host", "live", "replay"] = "jit"
    """jit: one program a step. host: its parts, the reward between them. live: workers draw while
    the trainer learns. replay: a live run again, to the bit."""
    system: SystemConfig = SYNCHRONOUS
    """Of live and replay."""
    schedule: Path | None = None
    """Of replay: the schedule.jsonl of a live run."""
    records: int = 0
    """Groups a step to record by the token (host, live, replay), for `jaxinfra rollouts`."""
    checkpoint_every: int = 50
    """Steps between checkpoints; one more is written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Continue the run in `out`."""
    seed: int = 0
    """Of first parameters, problems, their order and all draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; what is trained is kept in float32."""
    dry_run: bool = False
    """Compile a step, print its memory and the plan, and train nothing."""

    def __post_init__(self) -> None:
        for name in ("problems", "steps", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{self.method}: {name}={getattr(self, name)}: give 1 or more")
        for name in ("warm_steps", "records", "examples"):
            if getattr(self, name) < 0:
                raise UserError(f"{self.method}: {name} may not be negative")
        if self.rl.algorithm not in self.algorithms:
            raise UserError(
                f"{self.method}: rl.algorithm={self.rl.algorithm!r}: choose one of "
                f"{', '.join(self.algorithms)}"
            )
        if self.problems < self.rl.prompts:
            raise UserError(
                f"{self.method}: {self.problems} problems and {self.rl.prompts} prompts a step: "
                "give more problems"
            )
        if (self.loop == "replay") != (self.schedule is not None):
            raise UserError(f"{self.method}: --schedule FILE and --loop replay come together")
        if self.records and self.loop == "jit":
            raise UserError(f"{self.method}: a step in one program keeps no records: --loop host")
        if self.finetune is not None and self.policy is not None:
            raise UserError(f"{self.method}: policy and finetune are two models to begin with")
        if self.examples and self.finetune is None:
            raise UserError(f"{self.method}: examples are words: give a model to --finetune")
        if self.finetune is not None and self.loop == "jit":
            raise UserError(f"{self.method}: text is scored on the host: add --loop host")
        if self.loop in ("live", "replay"):
            self.system.check(self.rl)

    def __call__(self) -> None:
        """Trains so, or tells the plan: what the command does."""
        from align.online import plan, train

        (plan if self.dry_run else train)(self)


@dataclasses.dataclass(frozen=True)
class GRPO(OnlineConfig):
    """Compares answers of a group: GRPO and its children, REINFORCE++, GDPO of several rewards."""

    method = "grpo"
    algorithms = ("grpo", "gdpo", "reinforce++", "reinforce++-baseline")


@dataclasses.dataclass(frozen=True)
class RLOO(OnlineConfig):
    """Takes the mean of a group's other answers for the baseline (leave-one-out)."""

    method = "rloo"
    algorithms = ("rloo",)
    rl: RLConfig = LEAVE_ONE_OUT


@dataclasses.dataclass(frozen=True)
class PPO(OnlineConfig):
    """Learns a critic beside the policy, and clips both."""

    method = "ppo"
    algorithms = ("ppo",)
    rl: RLConfig = WITH_CRITIC


ONLINE: dict[str, type[OnlineConfig]] = {c.method: c for c in (PPO, GRPO, RLOO)}


def rollouts(run: Positional[Path], /, *, out: Path | None = None, steps: int = 20) -> None:
    """Renders a run's answers by the token, and its curves, as one page of HTML.

    Args:
      run: the folder of a run with records.
      out: the page; by default RUN/rollouts.html.
      steps: to show answers of, the last ones.
    """
    from align.rollouts_page import write

    print(write(run, out, steps=steps))
