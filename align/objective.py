"""What one update minimises: the policy's loss and the critic's, each a function of its own model.

`align.step` adds them in one program; `align.system.placement` computes them on meshes of their
own. Cost: a forward pass each, and twice that for the gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align.aggregate import masked_mean
from align.config import RLConfig
from align.experience import Experience, Metrics, mismatch
from align.logprobs import answer_logps
from align.losses import policy_loss, rloo_loss, value_loss
from align.packing import Plan, plan, rows_of
from align.rollout import Rollout
from align.value_model import ValueModel, answer_values
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params


def logps_of(
    config: RLConfig, model: ModelConfig, params: Params, r: Rollout, dtype: Any
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities and entropies of the answers' tokens."""
    return answer_logps(
        _cast(params, dtype), model, r.tokens, r.lengths, config.max_new_tokens, config.sampling,
        packed(config, r), remat=config.remat,
    )  # fmt: skip


def values_of(
    config: RLConfig, model: ModelConfig, critic: ValueModel, r: Rollout, dtype: Any
) -> Float[Array, "B T"]:
    """The critic's word on the answers' tokens."""
    return answer_values(
        _cast(critic, dtype), model, r.tokens, r.lengths, config.max_new_tokens,
        packed(config, r), remat=config.remat,
    )  # fmt: skip


def packed(config: RLConfig, r: Rollout) -> Plan | None:
    """Where the sequences stand in fewer rows; None where the config packs nothing."""
    if not config.pack:
        return None
    B, S = r.tokens.shape
    places = jnp.arange(1, r.mask.shape[1] + 1)  # a mask may have gaps: words of a tool
    sizes = r.lengths + jnp.max(jnp.where(r.mask > 0, places, 0), axis=1)
    return plan(sizes - 1, S - 1, rows_of(config.pack, B))


def policy_objective(
    config: RLConfig, model: ModelConfig, policy: Params, e: Experience, dtype: Any
) -> tuple[Float[Array, ""], Metrics]:
    """The surrogate of the algorithm, and metrics under TRL's names."""
    logps, entropy = logps_of(config, model, policy, e.rollout, dtype)
    old = jax.lax.stop_gradient(logps) if e.old_logps is None else e.old_logps
    if config.algorithm == "rloo":
        advantages = e.advantages[:, 0]
        if e.weights is not None:  # of whole answers, and none is negative
            advantages = advantages * e.weights[:, 0]
        total, metrics = rloo_loss(
            logps, old, advantages, e.mask,
            clip_low=config.loss.clip_low, clip_high=config.loss.clip_high,
        )  # fmt: skip
        metrics["entropy"] = masked_mean(entropy, e.mask)
    else:
        total, metrics = policy_loss(
            logps, old, e.advantages, e.mask, config.loss, ref_logps=e.ref_logps,
            entropy=entropy, weights=e.weights, length=config.max_new_tokens,
        )  # fmt: skip
    if where := packed(config, e.rollout):
        metrics["packing/fill"] = jnp.mean((where.segments > 0).astype(jnp.float32))
        metrics["packing/fits"] = where.fits.astype(jnp.float32)
    return total, metrics | mismatch(old, e.rollout, e.mask)


def critic_objective(
    config: RLConfig, model: ModelConfig, critic: ValueModel, e: Experience, dtype: Any
) -> tuple[Float[Array, ""], Metrics]:
    """value_coef times the critic's clipped error, and metrics."""
    assert e.values is not None and e.returns is not None
    values = values_of(config, model, critic, e.rollout, dtype)
    error, metrics = value_loss(values, e.values, e.returns, e.mask, clip=config.value_clip)
    return config.value_coef * error, metrics | {"loss/value": error}


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
