"""A softmax that sees its logits a block at a time (Milakov and Gimelshein, arXiv 1805.02867)."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)


def weigh(
    products: Float[Array, "r c"], top: Float[Array, " r"], total: Float[Array, " r"], unit: float
) -> tuple[Float[Array, "r c"], Float[Array, " r"], Float[Array, " r"], Float[Array, " r"]]:
    """Weights of a further block, the new `top` and `total`, and what older sums shrink by.

    products: of q and k; times `unit` they are the logits in base 2.
    top: the largest logit so far, in base 2.
    total: the sum of 2 ** (logit - top) so far.
    """
    new = jnp.maximum(top, jnp.max(products, axis=1) * unit)
    weights = jnp.exp2(products * unit - lax.broadcast_in_dim(new, products.shape, (0,)))
    shrink = jnp.exp2(top - new)
    return weights, new, total * shrink + jnp.sum(weights, axis=1), shrink


def times(values: Float[Array, "r c"], rows: Float[Array, " r"]) -> Float[Array, "r c"]:
    """Every row of `values` times its number in `rows`."""
    return values * lax.broadcast_in_dim(rows, values.shape, (0,))
