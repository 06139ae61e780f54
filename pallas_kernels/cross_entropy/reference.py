"""Cross-entropy and log-probabilities of a linear layer as plain mathematics: the specification.

Cost: 2 M D V FLOPs forward; the [M, V] logits live in memory in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def logits(
    x: Float[Array, "M D"], w: Float[Array, "D V"], soft_cap: float | None
) -> Float[Array, "M V"]:
    """x w in float32, softly capped."""
    z = jnp.einsum("md,dv->mv", x, w, preferred_element_type=jnp.float32)
    return z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)


def linear_cross_entropy(
    x: Float[Array, "M D"],
    w: Float[Array, "D V"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over m of weights[m] (nll[m] + z_loss lse[m]^2), and of weights[m] nll[m].

    nll[m] = lse[m] - z[m, targets[m]] with z = x w and lse its log-sum-exp; the z-loss is PaLM's
    (arXiv 2204.02311, section 5).
    """
    z = logits(x, w, soft_cap)
    lse = jax.nn.logsumexp(z, axis=-1)
    nll = lse - jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
    nll_sum = jnp.sum(weights * nll)
    return nll_sum + z_loss * jnp.sum(weights * lse**2), jax.lax.stop_gradient(nll_sum)


def token_logps(
    x: Float[Array, "M D"],
    w: Float[Array, "D V"],
    targets: Int[Array, " M"],
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Of each row the target's log-probability, and the entropy, in nats, of softmax(z / T).

    A target outside [0, V) has the log-probability NaN.
    """
    logps = jax.nn.log_softmax(logits(x, w, soft_cap) / temperature, axis=-1)
    inside = (targets >= 0) & (targets < w.shape[1])
    at = jnp.where(inside, targets, 0)[:, None]
    hit = jnp.take_along_axis(logps, at, axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
    return jnp.where(inside, hit, jnp.nan), entropy
