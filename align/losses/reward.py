"""The reward model's loss on pairs (Bradley and Terry), with a margin and centred."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def pairwise_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    *,
    margin: Float[Array, " B"] | float = 0.0,
    centre: float = 0.0,
) -> Float[Array, ""]:
    """mean(-log sigmoid(r_c - r_r - margin)) + centre mean((r_c + r_r)^2).

    arXiv 2203.02155 (InstructGPT), equation 1; the margin is Llama 2's (arXiv 2307.09288, equation
    2), the centring arXiv 2312.09244's, where 0.01 is used. The first term fixes differences only;
    the second puts the mean at zero. TRL's `RewardTrainer` and OpenRLHF's `PairWiseLoss` agree.

    Args:
      chosen, rejected: the model's reward of each answer of a pair.
    """
    loss = jnp.mean(-jax.nn.log_sigmoid(chosen - rejected - margin))
    return loss + centre * jnp.mean((chosen + rejected) ** 2)
