"""What a reinforcement-learning run is told, and which algorithm is which combination."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from align.advantages import Scale
from align.losses.off_policy import Correction
from align.losses.policy import PPO, PolicyLoss
from jaxinfra.errors import UserError
from jaxinfra.generate import Sampling
from jaxinfra.train.config import OptimizerConfig

Algorithm = Literal["grpo", "gdpo", "rloo", "reinforce++", "reinforce++-baseline", "ppo"]


ON_POLICY = Sampling(temperature=1.0)
ADAM = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, final_fraction=1.0, weight_decay=0.0)


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """One on-policy algorithm. The defaults are GRPO by tokens (DAPO's aggregation) without KL.

    B = prompts x group_size answers a step; each of them is used `epochs` times, in `minibatches`.
    """

    algorithm: Algorithm = "grpo"
    prompts: int = 16
    group_size: int = 8
    max_new_tokens: int = 16
    sampling: Sampling = ON_POLICY
    """How answers are drawn; log-probabilities are of the same distribution."""
    stop_id: int = 0
    epochs: int = 1
    minibatches: int = 1
    """Updates an epoch, of B / minibatches answers each."""
    loss: PolicyLoss = PPO
    """The surrogate on tokens (rloo has its own, on answers, with this clip)."""
    scale: Scale = "group"
    """What grpo divides its advantages by."""
    reward_weights: tuple[float, ...] = (1.0,)
    """One a reward, where there are several."""
    kl_coef: float = 0.0
    """Of the divergence from the reference as a part of the reward: rloo, reinforce++, ppo."""
    kl_target: float | None = None
    """Nats an answer that the coefficient is steered to; without it, it is fixed."""
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    whiten_rewards: bool = False
    importance: Correction | None = None
    """Weighs tokens by the old policy's probability over the sampler's."""
    importance_max: float = 3.0
    mask_truncated: bool = False
    """Answers that did not end by themselves do not count (DAPO's overlong filtering)."""
    overlong_cushion: int = 0
    """Tokens before the limit over which the reward falls by up to 1; 0: none."""
    only_informative: bool = False
    """Groups whose rewards are all alike do not count (DAPO's dynamic sampling, no refill)."""
    optimizer: OptimizerConfig = ADAM
    remat: Literal["none", "matmuls", "attention", "full"] = "none"
    pack: float = 0.0
    """Share of its rows that a forward pass's sequences are packed into, as 0.5; 0: one a row. A
    batch that does not fit is passed unpacked (metrics packing/fits, packing/fill)."""

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            known = ", ".join(get_args(Algorithm))
            raise UserError(f"align: algorithm={self.algorithm!r}: choose one of {known}")
        for name in ("prompts", "group_size", "max_new_tokens", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise UserError(f"align: {name}={getattr(self, name)}: give 1 or more")
        if self.answers % self.minibatches:
            raise UserError(
                f"align: {self.answers} answers a step do not divide into "
                f"{self.minibatches} minibatches"
            )
        if self.group_size == 1 and self.algorithm not in ("ppo", "reinforce++"):
            raise UserError(f"align: {self.algorithm} compares answers: give group_size 2 or more")
        if self.sampling.temperature == 0.0:
            raise UserError("align: temperature=0 draws the same answer always: give 1.0")
        if self.kl_coef and self.algorithm in ("grpo", "gdpo", "reinforce++-baseline"):
            raise UserError(
                f"align: {self.algorithm} takes the divergence into its loss: give loss.kl_coef"
            )
        if self.algorithm == "rloo" and (self.importance or "sequence").startswith("token"):
            raise UserError(
                f"align: importance={self.importance!r}: rloo weighs whole answers: give "
                "sequence_truncate or sequence_mask"
            )
        if not 0 <= self.pack < 1:
            raise UserError(f"align: pack={self.pack}: give a share of the rows below 1, or 0")
        if self.overlong_cushion >= self.max_new_tokens:
            raise UserError(f"align: overlong_cushion={self.overlong_cushion}: give less than "
                            f"max_new_tokens={self.max_new_tokens}")  # fmt: skip

    @property
    def answers(self) -> int:
        """B, answers a step."""
        return self.prompts * self.group_size

    @property
    def has_critic(self) -> bool:
        return self.algorithm == "ppo"

    @property
    def has_reference(self) -> bool:
        return bool(self.kl_coef or self.loss.kl_coef)
