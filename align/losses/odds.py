"""Preference losses without a reference model: ORPO, SimPO, CPO and AlphaPO."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfra.errors import UserError


def orpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    nll: Float[Array, ""],
    *,
    beta: float = 0.1,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """NLL - beta mean(logsig(log odds ratio)) (arXiv 2403.07691, equations 4, 6 and 7).

    log odds(p) = log p - log(1 - p), of the mean log-probability a token: summed ones, as in Tunix
    0.1.7, make 1 - p equal to 1. `nll` is the chosen row's mean over the batch's tokens, the prompt
    included in TRL. Where the mean is 0 (p = 1) the odds are infinite, here as in TRL.

    Args:
      chosen, rejected: log-probabilities of answers, averaged over their tokens.
    """
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    ratio = jax.nn.log_sigmoid(log_odds)
    metrics = {
        "log_odds_chosen": jnp.mean(log_odds),
        "log_odds_ratio": jnp.mean(ratio),
        "rewards/accuracies": jnp.mean((chosen > rejected).astype(chosen.dtype)),
    }
    return nll - beta * jnp.mean(ratio), metrics


def log1mexp(x: Array) -> Array:
    """log(1 - e^x) for x <= 0, to full precision on both sides of -log 2 (Maechler 2012)."""
    small = x < -math.log(2.0)
    far = jnp.log1p(-jnp.exp(jnp.where(small, x, -1.0)))
    near = jnp.log(-jnp.expm1(jnp.where(small, -0.1, x)))
    return jnp.where(small, far, near)


@dataclasses.dataclass(frozen=True)
class ContrastiveLoss:
    """A reference-free loss on pairs; the default is SimPO with its paper's kind of values."""

    kind: Literal["simpo", "sigmoid", "hinge", "ipo"] = "simpo"
    beta: float = 2.0
    gamma: float = 0.5
    """SimPO's target margin: gamma / beta is taken from the difference."""
    alpha: float = 0.0
    """AlphaPO's reward shape (arXiv 2501.03884); 0 is the logarithm."""
    label_smoothing: float = 0.0
    nll_coef: float = 0.0
    """Weight of the chosen answer's likelihood: TRL's `cpo_alpha`, 1 there by default; CPO has 1,
    SimPO 0."""

    def __post_init__(self) -> None:
        if self.kind not in ("simpo", "sigmoid", "hinge", "ipo"):
            raise UserError(f"contrastive loss: kind={self.kind!r}: simpo, sigmoid, hinge or ipo")


def contrastive_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    nll: Float[Array, ""] | float = 0.0,
    config: ContrastiveLoss = ContrastiveLoss(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """SimPO (arXiv 2405.14734, equation 6), CPO (arXiv 2401.08417, equation 3) and their kin.

    With u = h(chosen) - h(rejected), h(x) = x or (1 - e^(-alpha x)) / alpha, and e the smoothing:

    - simpo: y = u - gamma / beta: -(1-e) logsig(beta y) - e logsig(-beta y);
    - sigmoid: the same with y = u; hinge: relu(1 - beta u); ipo: (u - 1 / (2 beta))^2;

    the mean over pairs, plus nll_coef times `nll` of the chosen answers' tokens.

    Args:
      chosen, rejected: log-probabilities of answers: means over tokens for simpo and ipo, sums for
        sigmoid and hinge.
    """
    b, e, a = config.beta, config.label_smoothing, config.alpha
    u = chosen - rejected
    if a:
        u = (jnp.exp(-a * rejected) - jnp.exp(-a * chosen)) / a
    if config.kind == "hinge":
        loss = jax.nn.relu(1.0 - b * u)
    elif config.kind == "ipo":
        loss = (u - 0.5 / b) ** 2
    else:
        y = b * u - (config.gamma if config.kind == "simpo" else 0.0)
        loss = -(1.0 - e) * jax.nn.log_sigmoid(y) - e * jax.nn.log_sigmoid(-y)
    metrics = {
        "rewards/margins": b * jnp.mean(chosen - rejected),
        "rewards/accuracies": jnp.mean((chosen > rejected).astype(chosen.dtype)),
    }
    return jnp.mean(loss) + config.nll_coef * nll, metrics
