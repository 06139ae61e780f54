"""Drawing a token from each row of logits, in plain jnp: the specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def draw(
    logits: Float[Array, "S V"], temperature: Float[Array, " S"], uniform: Float[Array, " S"]
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """The first token at which the sum of probabilities passes `uniform`, and its log-probability.

    At temperature 0 the likeliest, told at temperature 1.
    """
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, jnp.maximum(temperature, 1e-5))[:, None]
    logps = jax.nn.log_softmax(scaled, axis=-1)
    passed = jnp.cumsum(jnp.exp(logps), axis=-1) > uniform[:, None]
    last = logits.shape[1] - 1
    drawn = jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)
    tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
    return tokens, jnp.take_along_axis(logps, tokens[:, None], axis=1)[:, 0]
