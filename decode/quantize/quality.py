"""How far a quantised model is from the one it came from, on text that neither was fitted to.

Perplexity is exp of the mean loss a token. KL is that of the quantised model's next-token
distribution from the other's, sum p log(p / q), mean over tokens: it is zero only where nothing
changed, and far less noisy than a difference of perplexities.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of held-out text: perplexity of both models, mean KL in nats, share of equal top tokens."""

    before: float
    after: float
    kl: float
    same_top: float


def compare(before: Params, after: Params, config: ModelConfig, tokens: np.ndarray) -> Quality:
    """Both models on `tokens`, int32 [windows, T]; one window is in memory at a time."""
    after_config = config.replace(tie_embeddings=after.unembed is None)
    sums = np.zeros(4)
    for row in tokens:
        sums += np.asarray(_one(before, after, jnp.asarray(row[None]), config, after_config))
    mean = sums / (tokens.shape[0] * (tokens.shape[1] - 1))
    return Quality(math.exp(mean[0]), math.exp(mean[1]), float(mean[2]), float(mean[3]))


@functools.partial(jax.jit, static_argnames=("config", "after_config"))
def _one(before, after, tokens, config, after_config):
    p, q = (
        jax.nn.log_softmax(transformer.forward(params, c, tokens)[0, :-1])
        for params, c in ((before, config), (after, after_config))
    )
    target = tokens[0, 1:, None]
    losses = [-jnp.sum(jnp.take_along_axis(x, target, axis=1)) for x in (p, q)]
    kl = jnp.sum(jnp.exp(p) * (p - q))
    return jnp.stack([*losses, kl, jnp.sum(jnp.argmax(p, -1) == jnp.argmax(q, -1), dtype=p.dtype)])
