"""Weights of tokens for what another program, or an older policy, has sampled.

The sampler's own log-probabilities (under the distribution it drew from, renormalised after top-k
and top-p) differ from the trainer's by rounding, stale weights or truncation. Truncated importance
sampling (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
2025; TRL's `vllm_importance_sampling_mode`) weighs by exp(old - sampler), limited or masked.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align.aggregate import masked_mean, sequence_mean, sequence_sum
from jaxinfra.errors import UserError

Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def truncated_importance(
    old_logps: Float[Array, "B T"],
    sampler_logps: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    kind: Correction = "sequence_mask",
    *,
    low: float | None = None,
    high: float = 3.0,
) -> Float[Array, "B T"] | Float[Array, "B 1"]:
    """exp(old - sampler), one a token or one a sequence (from the sum), without a gradient.

    "truncate" limits it to [low, high], "mask" makes it 0 outside. The default is TRL's. A token
    whose sampler's log-probability is nan weighs 1.
    """
    if kind not in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        raise UserError(f"importance: {kind!r}: token or sequence, then _truncate or _mask")
    d = jnp.where(jnp.isnan(sampler_logps) | (mask <= 0), 0.0, old_logps - sampler_logps)
    d = sequence_sum(d, mask)[:, None] if kind.startswith("sequence") else d
    ratio = jax.lax.stop_gradient(jnp.exp(d))
    if kind.endswith("truncate"):
        return jnp.clip(ratio, low, high)
    inside = (ratio <= high) & (ratio >= (0.0 if low is None else low))
    return jnp.where(inside, ratio, 0.0)


def off_policy_mask(
    logps: Float[Array, "B T"],
    sampler_logps: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    mask: Float[Array, "B T"],
    threshold: float,
) -> Float[Array, "B 1"]:
    """1 for rows to keep: A >= 0, or mean(sampler - logp) <= threshold nats (DeepSeek-V3.2)."""
    d = jax.lax.stop_gradient(sampler_logps - logps)
    drift = sequence_mean(jnp.where(jnp.isnan(d), 0.0, d), mask)
    return ((advantages >= 0) | (drift <= threshold)).astype(mask.dtype)[:, None]


def mismatch_kl(
    logps: Float[Array, "B T"], sampler_logps: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, ""]:
    """The mean k3 estimate of KL(sampler || trainer) in nats a token, on the sampler's tokens.

    r - 1 - log r with r = trainer / sampler, as prime-rl's `mismatch_kl`.
    """
    d = jnp.where(mask > 0, logps - sampler_logps, 0.0)
    return masked_mean(jnp.expm1(d) - d, mask)


def high_entropy(
    entropy: Float[Array, "B T"], mask: Float[Array, "B T"], share: float
) -> Float[Array, "B T"]:
    """1 at the `share` of tokens with the highest entropy (arXiv 2506.01939), ties included."""
    inside = jnp.where(mask > 0, entropy, jnp.nan)
    least = jnp.nanquantile(inside, 1.0 - share)
    return ((entropy >= least) & (mask > 0)).astype(mask.dtype)
