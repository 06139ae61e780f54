"""Direct preference optimisation and its family: fifteen losses on pairs of summed log-probs.

The implicit reward of an answer is beta (log p - log p_ref). With c, j those log-ratios of the
chosen and the rejected answer, s(.) the f-divergence's map, delta = s(c) - s(j), b = beta and e
the label smoothing, each kind's formula stands in `preference_loss`. TRL's `DPOTrainer` is the
oracle. Cost: nothing beside the four forward passes that the log-probabilities need.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align.aggregate import sequence_sum
from jaxinfra.errors import UserError

Kind = Literal[
    "sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "nca_pair", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

log_sigmoid = jax.nn.log_sigmoid


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """Which loss on pairs; the default is DPO (arXiv 2305.18290, equation 7)."""

    kind: Kind = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    """The share of pairs that may be the wrong way round; exo_pair needs some (1e-3)."""
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    """Of alpha_divergence; 1 is reverse_kl."""
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        choices = (("kind", self.kind, Kind), ("divergence", self.divergence, Divergence))
        for name, value, names in choices:
            if value not in get_args(names):
                known = ", ".join(get_args(names))
                raise UserError(f"preference loss: {name}={value!r}: one of {known}")
        if not self.beta > 0:
            raise UserError(f"preference loss: beta={self.beta}: give a positive number")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"preference loss: label_smoothing={self.label_smoothing}: [0, 0.5)")
        if self.kind == "exo_pair" and self.label_smoothing == 0:
            raise UserError("preference loss: exo_pair needs label_smoothing above 0, as 1e-3")


def preference_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    ref_chosen: Float[Array, " B"],
    ref_rejected: Float[Array, " B"],
    config: PreferenceLoss = PreferenceLoss(),
    *,
    chosen_lengths: Float[Array, " B"] | None = None,
    rejected_lengths: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The mean over pairs, and TRL's metrics of the implicit rewards.

    - sigmoid: -(1-e) logsig(b delta) - e logsig(-b delta). With e = 0 DPO; else conservative DPO
      (Mitchell 2023), as in OpenRLHF and Tunix. TRL 1.16 ignores e here.
    - hinge: relu(1 - b delta) (SLiC, arXiv 2309.06657).
    - ipo: (s(c) / n_c - s(j) / n_j - 1 / (2b))^2 (arXiv 2310.12036, equation 17; a token,
      as its authors confirmed to TRL; OpenRLHF takes sums).
    - sigmoid_norm: -logsig(b (s(c) / n_c - s(j) / n_j)) (Tulu 3, arXiv 2411.15124).
    - robust: (-(1-e) logsig(b delta) + e logsig(-b delta)) / (1 - 2e) (arXiv 2403.00409).
    - exo_pair: KL of (q, 1-q) from (1-e, e), q = sig(b delta) (arXiv 2402.00856, equation 16).
    - nca_pair: -logsig(bc) - logsig(-bc) / 2 - logsig(-bj) / 2 (arXiv 2402.05369).
    - bco_pair: -logsig(bc) - logsig(-bj) (arXiv 2404.04656, without its shift).
    - sppo_hard: (c - 1/(2b))^2 + (j + 1/(2b))^2 (arXiv 2405.00675).
    - aot: as sigmoid with sort(chosen - rejected) - sort(ref's) over the batch (arXiv 2406.05882);
      aot_unpaired: with sort(c) - sort(j).
    - apo_zero: 1 - sig(bc) + sig(bj); apo_down: sig(bc) + 1 - sig(b (c - j)) (arXiv 2408.06266).
    - discopop: -(1-w) logsig(b delta) + w e^(-b delta), w = sig(b delta / tau) (arXiv 2406.08414).

    s(x) is x (reverse_kl), 1 - e^-x (forward_kl), log 2 + logsig(x) (js_divergence) or
    (e^((a-1) x) - 1) / (a-1) (alpha_divergence, exponents to 80): arXiv 2309.16240.

    Args:
      chosen, rejected: log-probabilities of answers under the policy, summed over tokens.
      ref_chosen, ref_rejected: under the reference.
      chosen_lengths, rejected_lengths: tokens of the answers, for ipo and sigmoid_norm.
    """
    c, j = chosen - ref_chosen, rejected - ref_rejected
    b, e = config.beta, config.label_smoothing
    sc, sj = _map(c, config), _map(j, config)
    x = b * (sc - sj)
    if config.kind in ("ipo", "sigmoid_norm"):
        if chosen_lengths is None or rejected_lengths is None:
            raise UserError(f"preference loss: {config.kind} needs the answers' lengths")
        mean = sc / jnp.maximum(chosen_lengths, 1.0) - sj / jnp.maximum(rejected_lengths, 1.0)
        loss = (mean - 0.5 / b) ** 2 if config.kind == "ipo" else -log_sigmoid(b * mean)
    elif config.kind == "sigmoid":
        loss = _smoothed(x, e)
    elif config.kind == "hinge":
        loss = jax.nn.relu(1.0 - x)
    elif config.kind == "robust":
        loss = (-(1.0 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1.0 - 2.0 * e)
    elif config.kind == "exo_pair":
        right = jax.nn.sigmoid(x) * (log_sigmoid(x) - math.log1p(-e))
        loss = right + jax.nn.sigmoid(-x) * (log_sigmoid(-x) - math.log(e))
    elif config.kind == "nca_pair":
        loss = -log_sigmoid(b * c) - 0.5 * log_sigmoid(-b * c) - 0.5 * log_sigmoid(-b * j)
    elif config.kind == "bco_pair":
        loss = -log_sigmoid(b * c) - log_sigmoid(-b * j)
    elif config.kind == "sppo_hard":
        loss = (c - 0.5 / b) ** 2 + (j + 0.5 / b) ** 2
    elif config.kind == "aot":
        ours, theirs = jnp.sort(chosen - rejected), jnp.sort(ref_chosen - ref_rejected)
        loss = _smoothed(b * (ours - theirs), e)
    elif config.kind == "aot_unpaired":
        loss = _smoothed(b * (jnp.sort(c) - jnp.sort(j)), e)
    elif config.kind == "apo_zero":
        loss = jax.nn.sigmoid(-b * c) + jax.nn.sigmoid(b * j)
    elif config.kind == "apo_down":
        loss = jax.nn.sigmoid(b * c) + jax.nn.sigmoid(-b * (c - j))
    else:  # discopop
        w = jax.nn.sigmoid(x / config.discopop_tau)
        loss = -(1.0 - w) * log_sigmoid(x) + w * jnp.exp(-x)
    metrics = {
        "rewards/chosen": b * jnp.mean(c),
        "rewards/rejected": b * jnp.mean(j),
        "rewards/margins": b * jnp.mean(c - j),
        "rewards/accuracies": jnp.mean((c > j).astype(c.dtype)),
    }
    return jnp.mean(loss), metrics


def length_desensitised(
    logps: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    other_mask: Float[Array, "B T2"],
    alpha: float,
) -> Float[Array, " B"]:
    """A pair's summed log-probability whose tail past the shorter answer weighs `alpha`.

    LD-DPO (arXiv 2409.06411, equation 9); TRL's `ld_alpha`. To be used for policy and reference.
    """
    n = jnp.minimum(jnp.sum(mask, axis=1), jnp.sum(other_mask, axis=1))
    shared = jnp.cumsum(mask, axis=1) <= n[:, None]
    return sequence_sum(logps * jnp.where(shared, 1.0, alpha).astype(logps.dtype), mask)


def _smoothed(x: Array, e: float) -> Array:
    return -(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def _map(x: Array, config: PreferenceLoss) -> Array:
    if config.divergence == "forward_kl":
        return 1.0 - jnp.exp(-x)
    if config.divergence == "js_divergence":
        return math.log(2.0) + log_sigmoid(x)
    power = config.alpha - 1.0
    if config.divergence == "reverse_kl" or abs(power) < 1e-6:
        return x
    return (jnp.exp(jnp.minimum(power * x, 80.0)) - 1.0) / power
