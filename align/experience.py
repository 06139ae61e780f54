"""What is made of answers and rewards: advantages by the algorithm's rule, and metrics.

Cost: passes over [B, T], nothing beside a forward pass.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from align import advantages as A
from align.aggregate import masked_mean, sequence_sum, whiten
from align.config import RLConfig
from align.losses import estimate_kl, mismatch_kl, truncated_importance
from align.rollout import Rollout

Metrics = dict[str, Float[Array, ""]]


@struct.dataclass
class Experience:
    """Answers and all that an update needs of them."""

    rollout: Rollout
    rewards: Float[Array, " B"]  # weighed and summed, before any divergence
    mask: Float[Array, "B T"]  # the tokens that count
    advantages: Float[Array, "B T"]
    weights: Float[Array, "B T"] | None = None
    old_logps: Float[Array, "B T"] | None = None  # None: one update, whose own they are
    ref_logps: Float[Array, "B T"] | None = None
    values: Float[Array, "B T"] | None = None
    returns: Float[Array, "B T"] | None = None
    kl: Float[Array, ""] | None = None  # nats an answer, where it is a part of the reward


def judge(
    config: RLConfig,
    r: Rollout,
    rewards: Float[Array, "B R"] | Float[Array, " B"],
    old: Float[Array, "B T"] | None,
    ref: Float[Array, "B T"] | None,
    values: Float[Array, "B T"] | None,
    kl_coef: Float[Array, ""],
) -> tuple[Experience, Metrics]:
    """Advantages of answers by the algorithm's rule, and metrics of rewards and lengths.

    `rewards` is one number an answer, or one a reward function; nan where it could not be had.
    """
    several = rewards if rewards.ndim == 2 else rewards[:, None]
    weights = jnp.asarray(config.reward_weights, jnp.float32)
    present = ~jnp.isnan(several)
    total = jnp.sum(jnp.where(present, several * weights, 0.0), axis=1)
    valid = jnp.any(present, axis=1)
    counted = jnp.where(valid, total, jnp.nan)
    lengths = jnp.sum(r.mask, axis=1)
    if config.overlong_cushion:
        shortened = A.overlong_penalty(lengths, config.max_new_tokens, config.overlong_cushion)
        counted = counted + shortened
    mask = r.mask
    if config.mask_truncated:
        mask = mask * r.stopped[:, None]
    if config.only_informative:
        mask = mask * A.informative(counted, config.group_size).astype(mask.dtype)[:, None]
    G = config.group_size
    metrics = _reward_metrics(several, total, valid, r, G)
    kl = kl_tokens = returns = None
    if config.kl_coef:
        assert ref is not None
        kl_tokens = estimate_kl(r.logps if old is None else old, ref, "k1") * r.mask
        kl = jnp.mean(sequence_sum(kl_tokens, r.mask))
        metrics["kl"] = masked_mean(kl_tokens, r.mask)
        metrics["kl_coef"] = kl_coef
    advantages: Array
    if config.algorithm == "grpo":
        advantages = A.group_relative(counted, G, scale=config.scale)
    elif config.algorithm == "gdpo":
        advantages = A.decoupled(several, G, weights)
    elif config.algorithm == "rloo":
        if kl_tokens is not None:
            counted = counted - kl_coef * sequence_sum(kl_tokens, r.mask)
        advantages = A.leave_one_out(counted, G)
    elif config.algorithm == "reinforce++-baseline":
        advantages = A.reinforce_pp_baseline(counted, mask, G)
    else:
        tokens = A.at_last_token(counted, r.mask)
        if kl_tokens is not None:
            tokens = tokens - kl_coef * kl_tokens
        if config.algorithm == "reinforce++":
            advantages = A.reinforce_pp(tokens, r.mask, gamma=config.gamma)
        else:
            assert values is not None
            if config.whiten_rewards:
                tokens = whiten(tokens, r.mask, shift=False)
            raw, returns = A.gae(tokens, values, r.mask, gamma=config.gamma, lam=config.lam)
            advantages = whiten(raw, r.mask)
        advantages = jnp.where(valid[:, None], advantages, 0.0)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], mask.shape)
    correction = None
    if config.importance is not None:
        assert old is not None
        correction = truncated_importance(
            old, r.logps, r.mask, config.importance, high=config.importance_max
        )
        correction = jnp.broadcast_to(correction, mask.shape)
    return Experience(
        r, jnp.where(valid, total, 0.0), mask, advantages, correction, old, ref, values, returns, kl
    ), metrics


def mismatch(logps: Float[Array, "B T"], r: Rollout, mask: Float[Array, "B T"]) -> Metrics:
    """How far the trainer's log-probabilities are from the sampler's, on the tokens that count.

    mismatch_kl is `align.losses.mismatch_kl`; the others have TRL's names: the absolute difference
    in nats, and the ratio of probabilities before it is limited.
    """
    inside = mask > 0
    d = jnp.where(inside, logps - r.logps, 0.0)
    ratio = jnp.exp(d)
    return {
        "mismatch_kl": mismatch_kl(logps, r.logps, mask),
        "sampling/sampling_logp_difference/mean": masked_mean(jnp.abs(d), mask),
        "sampling/sampling_logp_difference/max": jnp.max(jnp.abs(d)),
        "sampling/importance_sampling_ratio/mean": masked_mean(ratio, mask),
        "sampling/importance_sampling_ratio/min": jnp.min(ratio),
        "sampling/importance_sampling_ratio/max": jnp.max(ratio),
    }


def _reward_metrics(several: Array, total: Array, valid: Array, r: Rollout, G: int) -> Metrics:
    """TRL's names."""
    n = jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)
    grouped = jnp.where(valid, total, jnp.nan).reshape(-1, G)
    spread = jnp.nan_to_num(jnp.nanstd(grouped, axis=1)) if G > 1 else jnp.zeros(len(grouped))
    lengths = jnp.sum(r.mask, axis=1)
    return {
        "reward": jnp.sum(jnp.where(valid, total, 0.0)) / n,
        "reward_std": jnp.mean(spread),
        "frac_reward_zero_std": jnp.mean((spread < 1e-6).astype(jnp.float32)),
        "rewards/invalid": jnp.mean(1.0 - valid.astype(jnp.float32)),
        **{
            f"rewards/{k}/mean": jnp.nan_to_num(jnp.nanmean(several[:, k]))
            for k in range(several.shape[1])
            if several.shape[1] > 1
        },
        "completions/mean_length": jnp.mean(lengths),
        "completions/min_length": jnp.min(lengths),
        "completions/max_length": jnp.max(lengths),
        "completions/clipped_ratio": 1.0 - jnp.mean(r.stopped),
    }
