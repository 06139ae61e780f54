"""Root-mean-square norms (arXiv 1910.07467) in plain jnp: the specification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "*#rows D"],
    *,
    eps: float,
    plus_one: bool = False,
) -> Float[Array, "*rows D"]:
    """x / sqrt(mean(x^2) + eps) times the weight, or one plus it; in float32, rounded once."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    scale = weight.astype(jnp.float32)
    return (x32 * (1.0 + scale if plus_one else scale)).astype(x.dtype)


def add_rms_norm(
    x: Float[Array, "*rows D"], residual: Float[Array, "*rows D"], weight: Float[Array, "*#rows D"],
    *, eps: float, plus_one: bool = False,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:  # fmt: skip
    """x + residual in their dtype, and the norm of that sum."""
    total = x + residual
    return total, rms_norm(total, weight, eps=eps, plus_one=plus_one)
