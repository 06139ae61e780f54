"""The critic's loss: squared error to returns, its movement clipped."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from align.aggregate import masked_mean


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    clip: float | None = 0.2,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Half the mean of max((V - ret)^2, (clip(V, V_old +- clip) - ret)^2), and the clipped share.

    PPO's reference implementation (openai/baselines `ppo2`); TRL 1.12 and verl alike, with clips of
    0.2 and 0.5. TRL's mask reaches one token past the last; the caller gives the mask.
    """
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * masked_mean(error, mask), {"value/clipfrac": jnp.zeros((), values.dtype)}
    near = jnp.clip(values, old_values - clip, old_values + clip)
    clipped = (near - returns) ** 2
    share = masked_mean((clipped > error).astype(values.dtype), mask)
    return 0.5 * masked_mean(jnp.maximum(error, clipped), mask), {"value/clipfrac": share}
