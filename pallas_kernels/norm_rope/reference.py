"""RMSNorm over the head width, then rotary position embedding, in plain jnp: the specification."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.rms_norm import reference


def norm_rope(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], cos: Float[Array, "B T 1 h"],
    sin: Float[Array, "B T 1 h"], q_norm: Float[Array, " H"] | None = None,
    k_norm: Float[Array, " H"] | None = None, *, eps: float = 1e-6, plus_one: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:  # fmt: skip
    """Each head normed, where there are weights, and turned; in float32, rounded once."""

    def one(x, weight):
        x32 = x.astype(jnp.float32)
        if weight is not None:
            x32 = reference.rms_norm(x32, weight, eps=eps, plus_one=plus_one)
        return rotate(x32, cos, sin).astype(x.dtype)

    return one(q, q_norm), one(k, k_norm)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 h"], sin: Float[Array, "B T 1 h"]
) -> Float[Array, "B T N H"]:
    """Turns the pairs (x[i], x[i + h]), h = H/2, by their angles (arXiv 2104.09864)."""
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
