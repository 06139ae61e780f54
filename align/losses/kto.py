"""Kahneman-Tversky optimisation: single answers marked good or bad, no pairs."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinfra.errors import UserError


def kto_loss(
    logps: Float[Array, " B"],
    ref_logps: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    kl_logps: Float[Array, " B"] | None = None,
    ref_kl_logps: Float[Array, " B"] | None = None,
    *,
    kind: Literal["kto", "apo_zero_unpaired"] = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The mean over answers of w_D (1 - sig(beta (rho - z))) or w_U (1 - sig(beta (z - rho))).

    arXiv 2402.01306, equation 7, with rho = logp - ref summed over tokens, z the point of
    reference: the clamped mean over the batch of kl_logps - ref_kl_logps, without a gradient. Those
    are log-probabilities of answers under a prompt they do not belong to (`mismatched`); they
    estimate the divergence on the prompts of the batch. A batch of one class is no special
    case. With "apo_zero_unpaired" (arXiv 2408.06266) there is no z. TRL's `KTOTrainer` agrees;
    OpenRLHF dropped KTO.
    """
    if kind not in ("kto", "apo_zero_unpaired"):
        raise UserError(f"kto loss: kind={kind!r}: choose kto or apo_zero_unpaired")
    rho = logps - ref_logps
    z = jnp.zeros((), rho.dtype)
    if kind == "kto":
        if kl_logps is None or ref_kl_logps is None:
            raise UserError("kto loss: give kl_logps and ref_kl_logps, of mismatched answers")
        z = jax.lax.stop_gradient(jnp.maximum(jnp.mean(kl_logps - ref_kl_logps), 0.0))
    good = desirable_weight * jax.nn.sigmoid(-beta * (rho - z))
    bad = undesirable_weight * jax.nn.sigmoid(beta * (rho - z))
    rewards = beta * rho
    n = jnp.sum(desirable.astype(rho.dtype))
    metrics = {
        "kl": z,
        "rewards/chosen": jnp.sum(jnp.where(desirable, rewards, 0.0)) / jnp.maximum(n, 1.0),
        "rewards/rejected": jnp.sum(jnp.where(desirable, 0.0, rewards))
        / jnp.maximum(rho.shape[0] - n, 1.0),
    }
    return jnp.mean(jnp.where(desirable, good, bad)), metrics


def mismatched(completions: Array) -> Array:
    """Row i gets the answer of row i - 1, the first the last's: answers to other prompts."""
    return jnp.roll(completions, 1, axis=0)
