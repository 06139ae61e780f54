"""Losses of alignment as pure functions of log-probabilities and masks; each against TRL's.

| file | algorithms |
| --- | --- |
| sft | likelihood, dynamic fine-tuning |
| reward | Bradley-Terry, margin, centred |
| preference | DPO, IPO, hinge, robust, EXO, NCA, BCO, SPPO, AOT, APO, DiscoPOP, LD-DPO |
| kto | KTO, unpaired APO |
| odds | ORPO, SimPO, CPO, AlphaPO |
| policy | PPO, GRPO, BNPO, Dr. GRPO, DAPO, GSPO, LUSPO, CISPO, SAPO, VESPO, RLOO |
| value | PPO's critic |
| kl | k1, k2, k3, straight-through; the adaptive controller |
| off_policy | truncated importance sampling, off-policy masks, mismatch |
| distributional | Group Distributional Preference Optimization |
"""

from align.losses.distributional import belief_loss, gdpo_loss, mixture_distance
from align.losses.kl import KLController, estimate_kl
from align.losses.kto import kto_loss, mismatched
from align.losses.odds import ContrastiveLoss, contrastive_loss, orpo_loss
from align.losses.off_policy import (
    high_entropy,
    mismatch_kl,
    off_policy_mask,
    truncated_importance,
)
from align.losses.policy import (
    BNPO,
    CISPO,
    DAPO,
    DR_GRPO,
    GRPO,
    GSPO,
    LUSPO,
    PPO,
    SAPO,
    VESPO,
    PolicyLoss,
    policy_loss,
    rloo_loss,
)
from align.losses.preference import PreferenceLoss, length_desensitised, preference_loss
from align.losses.reward import pairwise_loss
from align.losses.sft import dft_loss, nll_loss
from align.losses.value import value_loss

__all__ = [
    "BNPO", "CISPO", "DAPO", "DR_GRPO", "GRPO", "GSPO", "LUSPO", "PPO", "SAPO", "VESPO",
    "ContrastiveLoss", "KLController", "PolicyLoss", "PreferenceLoss", "belief_loss",
    "contrastive_loss", "dft_loss", "estimate_kl", "gdpo_loss", "high_entropy", "kto_loss",
    "length_desensitised", "mismatch_kl", "mismatched", "mixture_distance", "nll_loss",
    "off_policy_mask", "orpo_loss", "pairwise_loss", "policy_loss", "preference_loss", "rloo_loss",
    "truncated_importance", "value_loss",
]  # fmt: skip
