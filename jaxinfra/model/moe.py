"""The mixture-of-experts feed-forward, dense: every expert sees every token, most weights are zero.

This is the reference path: E/top_k times the FLOPs a sparse path needs, and exact. A scan over
experts keeps memory at one expert's activations.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxinfra.model.config import Experts
from jaxinfra.model.params import MoE


@struct.dataclass
class Balance:
    """Router statistics of a layer, or of L stacked ones, for the load-balance loss."""

    chosen: Float[Array, "*L E"]  # mean over tokens of how many of the top-k choices fell on e
    probability: Float[Array, "*L E"]  # mean router probability of e


def route(
    x: Float[Array, "B T D"], router: Float[Array, "D E"], experts: Experts
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
    """(weight of each expert for each token, zero where not chosen; router probabilities).

    Both float32. The softmax is over all experts before the choice, as in Mixtral and Qwen3-MoE.
    """
    logits = jnp.einsum("btd,de->bte", x, router)
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    top, index = jax.lax.top_k(probability, experts.top_k)
    if experts.renormalise:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    onehot = jax.nn.one_hot(index, experts.num_experts, dtype=jnp.float32)
    return jnp.einsum("btk,btke->bte", top, onehot), probability


def feed_forward(
    moe: MoE,
    x: Float[Array, "B T D"],
    experts: Experts,
    activation: Callable[[Array], Array],
    real: Float[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Balance]:
    """The weighted sum of the chosen experts; `real` is 1 for tokens that count in the balance."""
    weight, probability = route(x, moe.router, experts)

    def add(total, expert):
        gate, up, down, share = expert
        hidden = activation(jnp.einsum("btd,df->btf", x, gate)) * jnp.einsum("btd,df->btf", x, up)
        out = jnp.einsum("btf,fd->btd", hidden, down)
        return total + share[:, :, None].astype(out.dtype) * out, None

    shares = jnp.moveaxis(weight, -1, 0)
    total, _ = jax.lax.scan(add, jnp.zeros_like(x), (moe.gate, moe.up, moe.down, shares))
    real = jnp.ones(x.shape[:2], jnp.float32) if real is None else real
    count = jnp.maximum(jnp.sum(real), 1.0)
    balance = Balance(
        chosen=jnp.einsum("bte,bt->e", (weight > 0).astype(jnp.float32), real) / count,
        probability=jnp.einsum("bte,bt->e", probability, real) / count,
    )
    return total, balance


def balance_loss(balance: Balance) -> Float[Array, ""]:
    """E times the dot product of the shares chosen and the mean probabilities, over all layers.

    Switch Transformer (arXiv 2101.03961, equation 4) as transformers computes it for Mixtral and
    Qwen3-MoE: the averages run over tokens and layers, and the k choices of a token are summed.
    """
    E = balance.chosen.shape[-1]
    chosen = balance.chosen.reshape(-1, E).mean(axis=0)
    probability = balance.probability.reshape(-1, E).mean(axis=0)
    return E * jnp.sum(chosen * probability)
