"""Supervised losses of an answer's tokens: log-likelihood, and dynamic fine-tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align.aggregate import aggregate


def nll_loss(
    logps: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The mean of -log p over the answer's tokens, in nats; 0 where there are none.

    `count`: the tokens of the whole batch, where this is a part of it: the mean over the parts'
    means is another number (the accumulation mistake of transformers before 4.46).
    """
    return aggregate(-logps, mask, "token-mean", count=count)


def dft_loss(
    logps: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Dynamic fine-tuning (arXiv 2508.05629, equation 9): -log p times sg(p), mean over tokens.

    The factor takes away the 1/p by which likelihood weighs a token that the policy finds unlikely.
    """
    weight = jnp.exp(jax.lax.stop_gradient(logps))
    return aggregate(-logps * weight, mask, "token-mean", count=count)
