"""Policy losses on sampled tokens: PPO's clip and what grew from it, one function for all.

`PolicyLoss` names the choices (ratio, clip, divergence, aggregation); the constants below are the
published algorithms. All work on log-probabilities of the sampled tokens under the temperature and
truncation they were sampled with: at another temperature the ratio is not 1 on-policy.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align.aggregate import Mode, aggregate, masked_mean, sequence_mean, sequence_sum
from align.losses.kl import Estimator, estimate_kl
from jaxinfra.errors import UserError

Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """Which surrogate, of which ratio, clipped where, averaged how; the default is TRL's GRPO."""

    surrogate: Literal["clip", "cispo", "sapo", "vespo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    """sequence: GSPO's geometric mean over the answer, with a gradient through all its tokens."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """Ratios are clipped to [1 - clip_low, 1 + clip_high]. For cispo it is the cap of the weight
    itself, and clip_low is not used (TRL; verl clips on both sides of 1)."""
    delta: float | None = None
    """Two-sided clipping: the unclipped ratio is cut here too (INTELLECT-2, arXiv 2505.07291)."""
    dual_clip: float | None = None
    """The loss of a negative advantage is at most this times it (arXiv 1912.09729; verl: 3)."""
    kl_coef: float = 0.0
    kl: Estimator = "k3"
    kl_ratio: bool = True
    """Weigh the divergence by the ratio, which makes its gradient unbiased (DeepSeek-V3.2); TRL's
    `use_bias_correction_kl`."""
    entropy_coef: float = 0.0
    aggregation: Mode = "sequence-mean-token-mean"

    def __post_init__(self) -> None:
        if self.surrogate not in ("clip", "cispo", "sapo", "vespo"):
            raise UserError(f"policy loss: surrogate={self.surrogate!r}: clip, cispo, sapo, vespo")
        if self.ratio not in ("token", "sequence"):
            raise UserError(f"policy loss: ratio={self.ratio!r}: choose token or sequence")
        if self.surrogate == "clip" and not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise UserError(
                f"policy loss: clip_low={self.clip_low}, clip_high={self.clip_high}: give "
                "distances from 1, the lower in [0, 1]"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"policy loss: dual_clip={self.dual_clip}: give more than 1, as 3")


_TOKENS: Mode = "token-mean"
PPO = PolicyLoss(aggregation=_TOKENS)  # arXiv 1707.06347, equation 7
GRPO = PolicyLoss()  # arXiv 2402.03300
BNPO = PolicyLoss(aggregation=_TOKENS)  # TRL's name for GRPO by tokens of the microbatch
DR_GRPO = PolicyLoss(aggregation="sequence-mean-token-sum-norm")  # arXiv 2503.20783
DAPO = PolicyLoss(clip_high=0.28, aggregation=_TOKENS)  # arXiv 2503.14476, clip-higher
GSPO = PolicyLoss(ratio="sequence", clip_low=3e-4, clip_high=4e-4)  # arXiv 2507.18071
LUSPO = PolicyLoss(ratio="sequence", aggregation="sequence-mean-token-sum")  # arXiv 2602.05261
CISPO = PolicyLoss(surrogate="cispo", clip_high=5.0, aggregation=_TOKENS)  # arXiv 2506.13585
SAPO = PolicyLoss(surrogate="sapo")  # arXiv 2511.20347
VESPO = PolicyLoss(surrogate="vespo", aggregation=_TOKENS)  # arXiv 2602.10693


def policy_loss(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | Float[Array, " B"],
    mask: Float[Array, "B T"],
    config: PolicyLoss = GRPO,
    *,
    ref_logps: Float[Array, "B T"] | None = None,
    entropy: Float[Array, "B T"] | None = None,
    weights: Float[Array, "B T"] | None = None,
    length: int | None = None,
    count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss to differentiate in `logps`, and metrics under TRL's names.

    With r = exp(logp - old) (or its geometric mean over the row) and A the advantage, a token gives

    - clip: -min(r A, clip(r, 1 - low, 1 + high) A);
    - cispo: -sg(min(r, high)) A logp;
    - sapo: -(4 / tau) sigmoid(tau (r - 1)) A, tau = 1 where A > 0, else 1.05;
    - vespo: -sg(phi) A logp, phi = e^lam w^k e^(-lam w), w the product of the row's ratios,
      (k, lam) = (2, 3) where A >= 0, else (3, 2);

    times `weights`, plus kl_coef times the divergence from the reference, aggregated; minus
    entropy_coef times the mean entropy. TRL does not limit logp - old (verl, OpenRLHF and Tunix: to
    +-20); here only masked tokens are kept from overflow.

    Args:
      advantages: one a row, or one a token.
      weights: of tokens: `truncated_importance`, `off_policy_mask` or a mask of high entropies. For
        vespo they are ratios that enter w, as in TRL.
      length, count: see `aggregate`.
    """
    d = jnp.where(mask > 0, logps - old_logps, 0.0)
    A = advantages[:, None] if advantages.ndim == 1 else advantages
    log_ratio = d if config.ratio == "token" else sequence_mean(d, mask)[:, None]
    ratio = jnp.exp(log_ratio)
    loss = _surrogate(config, logps, d, ratio, A, mask, weights)
    if weights is not None and config.surrogate != "vespo":
        loss = loss * weights
    metrics = _clip_metrics(config, ratio, A, mask)
    if config.kl_coef:
        if ref_logps is None:
            raise UserError(f"policy loss: kl_coef={config.kl_coef} needs ref_logps")
        safe = jnp.where(mask > 0, logps, ref_logps)
        kl = estimate_kl(safe, ref_logps, config.kl)
        loss = loss + config.kl_coef * (kl * ratio if config.kl_ratio else kl)
        metrics["kl"] = masked_mean(kl, mask)
    total = aggregate(loss, mask, config.aggregation, length=length, count=count)
    if entropy is not None:
        metrics["entropy"] = masked_mean(entropy, mask)
        if config.entropy_coef:
            total = total - config.entropy_coef * metrics["entropy"]
    elif config.entropy_coef:
        raise UserError(f"policy loss: entropy_coef={config.entropy_coef} needs `entropy`")
    return total, metrics


def _surrogate(
    config: PolicyLoss,
    logps: Array,
    d: Array,
    ratio: Array,
    A: Array,
    mask: Array,
    weights: Array | None,
) -> Array:
    """The loss a token, [B, T] or [B, 1]."""
    if config.surrogate == "cispo":
        return -jax.lax.stop_gradient(jnp.minimum(ratio, config.clip_high)) * A * logps
    if config.surrogate == "sapo":
        tau = jnp.where(A > 0, 1.0, 1.05).astype(ratio.dtype)
        return -4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0)) * A
    if config.surrogate == "vespo":
        return -jax.lax.stop_gradient(_gamma_weight(d, A, mask, weights)) * A * logps
    near = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.delta is not None:
        ratio = jnp.minimum(ratio, config.delta)
    loss = -jnp.minimum(ratio * A, near * A)
    if config.dual_clip is not None:
        loss = jnp.where(A < 0, jnp.minimum(loss, -config.dual_clip * A), loss)
    return loss


def _gamma_weight(d: Array, A: Array, mask: Array, weights: Array | None) -> Array:
    """VESPO's phi, [B, 1] for advantages of a row: a gamma density that is 1 at w = 1."""
    floor = math.log(1e-8)
    log_w = jnp.sum(jnp.clip(d, -20.0, 20.0) * mask, axis=1, keepdims=True)
    if weights is not None:
        log_w = log_w + jnp.sum(jnp.clip(jnp.log(weights), floor, 20.0), axis=1, keepdims=True)
    log_w = jnp.clip(log_w, floor, 20.0)
    k = jnp.where(A >= 0, 2.0, 3.0).astype(d.dtype)
    lam = jnp.where(A >= 0, 3.0, 2.0).astype(d.dtype)
    return jnp.nan_to_num(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)), posinf=0.0)


def _clip_metrics(config: PolicyLoss, ratio: Array, A: Array, mask: Array) -> Metrics:
    if config.surrogate == "cispo":
        return {"cispo_clip_ratio": _share((ratio > config.clip_high) & (A > 0), mask)}
    if config.surrogate != "clip":
        return {}
    low = (ratio < 1.0 - config.clip_low) & (A < 0)
    high = (ratio > 1.0 + config.clip_high) & (A > 0)
    return {
        "clip_ratio/low_mean": _share(low, mask),
        "clip_ratio/high_mean": _share(high, mask),
        "clip_ratio/region_mean": _share(low | high, mask),
    }


def _share(hit: Array, mask: Array) -> Float[Array, ""]:
    return masked_mean(hit.astype(mask.dtype), mask)


def rloo_loss(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    mask: Float[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Float[Array, ""], Metrics]:
    """RLOO's clipped loss: the whole answer is one action (arXiv 2402.14740, section 3.2).

    mean_i(-min(r A, clip(r, 1 - low, 1 + high) A)), r = exp(sum of the row's logp - old). As
    in TRL; verl and OpenRLHF keep a ratio a token. An empty answer counts, with r = 1.
    """
    ratio = jnp.exp(sequence_sum(logps - old_logps, mask))
    near = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    metrics = {
        "clip_ratio/low_mean": jnp.mean(low.astype(ratio.dtype)),
        "clip_ratio/high_mean": jnp.mean(high.astype(ratio.dtype)),
        "clip_ratio/region_mean": jnp.mean((low | high).astype(ratio.dtype)),
    }
    return -jnp.mean(jnp.minimum(ratio * advantages, near * advantages)), metrics
