"""Group Distributional Preference Optimization: keep a population's mixture of beliefs.

DPO on the answers of two groups of people pulls the policy to the larger group. GDPO (arXiv
2412.20299, section 4) lets the model first say a belief, fits the beliefs' distribution to the
population's, and prefers answers given the belief. Not to be taken for the group
reward-decoupled normalisation of the same letters: `align.advantages.decoupled`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from align.losses.preference import PreferenceLoss, preference_loss


def belief_loss(
    logits: Float[Array, "B V"], belief_ids: Int[Array, " C"], target: Float[Array, "B C"]
) -> Float[Array, ""]:
    """KL(target || policy's beliefs) in nats, mean over rows.

    The policy's log-probabilities are of the whole vocabulary, gathered at the C belief tokens
    (mass elsewhere counts against it), at the position that foretells the belief. 0 log 0 is 0.
    """
    logps = jax.nn.log_softmax(logits, axis=-1)[:, belief_ids]
    known = jnp.where(target > 0, jnp.log(jnp.where(target > 0, target, 1.0)), 0.0)
    return jnp.mean(jnp.sum(target * (known - logps), axis=-1))


def gdpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    ref_chosen: Float[Array, " B"],
    ref_rejected: Float[Array, " B"],
    belief_logits: Float[Array, "B V"],
    belief_ids: Int[Array, " C"],
    target: Float[Array, "B C"],
    belief: Int[Array, " B"],
    config: PreferenceLoss = PreferenceLoss(),  # noqa: B008 (immutable)
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """KL(target || beliefs) + DPO(answers given the belief) - mean log p(belief).

    As the loss `mpo` of the authors' code (BigBinnie/GDPO, `trainers.py`), all weights 1.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: summed over the answer, the belief not counted.
      belief: the index (into `belief_ids`) of the belief under which each pair was given.
    """
    kl = belief_loss(belief_logits, belief_ids, target)
    logps = jax.nn.log_softmax(belief_logits, axis=-1)[:, belief_ids]
    said = -jnp.mean(jnp.take_along_axis(logps, belief[:, None], axis=1))
    pairs, metrics = preference_loss(chosen, rejected, ref_chosen, ref_rejected, config)
    return kl + pairs + said, {**metrics, "belief_kl": kl, "belief_nll": said}


def mixture_distance(p: Float[Array, "... C"], q: Float[Array, "... C"]) -> Array:
    """Jensen-Shannon divergence of two distributions, in nats (0 to log 2)."""
    middle = 0.5 * (p + q)

    def divergence(a: Array) -> Array:
        ratio = jnp.where(a > 0, a, 1.0) / jnp.where(a > 0, middle, 1.0)
        return jnp.sum(jnp.where(a > 0, a, 0.0) * jnp.log(ratio), axis=-1)

    return 0.5 * (divergence(p) + divergence(q))
