"""The next-token loss of rows of tokens, without the logits [B, T, V] in memory.

Cost: 6 M D V FLOPs for head and loss, forward and backward, over M = B T rows; `block` x V float32
logits live at a time (pallas_kernels.cross_entropy).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfra.model import moe
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.model.transformer import hidden, unembedding
from pallas_kernels import linear_cross_entropy

Batch = Mapping[str, Any]  # int32 [B, T + 1]: "tokens", and "segment_ids" where rows are packed


def target_weights(batch: Batch) -> Float[Array, "B T"]:
    """1 where position t has a target at t + 1: not at padding, not across documents."""
    segments = batch.get("segment_ids")
    if segments is None:
        return jnp.ones((batch["tokens"].shape[0], batch["tokens"].shape[1] - 1), jnp.float32)
    here, following = segments[:, :-1], segments[:, 1:]
    return ((here > 0) & (here == following)).astype(jnp.float32)


def next_token_loss(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    count: Float[Array, ""] | None = None,
    z_loss: float = 0.0,
    block: int = 4096,
    **options: Any,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss to differentiate, and {"nll": mean over targets, in nats, without the other terms}.

    Args:
      batch: "tokens", of which [:, :-1] are read and [:, 1:] foretold; "segment_ids" of the same
        shape where documents are packed, 0 for padding.
      count: divide sums by this instead of the number of targets: that of the whole batch, where
        `batch` is a part of it. The balance loss is then weighted by the part's share.
      z_loss: weight of lse^2 (arXiv 2204.02311, section 5).
      block: the most rows of logits alive at a time; a quarter of the batch's where that is less.
      options: those of `jaxinfra.model.transformer.hidden`: remat, unroll, implementation.

    A mixture of experts adds `config.experts.balance_coef` times its load-balance loss.
    """
    tokens, weights = batch["tokens"], target_weights(batch)
    segments = batch.get("segment_ids")
    x, balance = hidden(
        params,
        config,
        tokens[:, :-1],
        segment_ids=None if segments is None else segments[:, :-1],
        **options,
    )
    own = jnp.sum(weights)
    count = jnp.maximum(own, 1.0) if count is None else count
    sums: Any = linear_cross_entropy(
        x.reshape(-1, x.shape[-1]),
        unembedding(params),
        tokens[:, 1:].reshape(-1),
        weights.reshape(-1),
        z_loss,
        config.logit_soft_cap,
        min(block, -(-weights.size // 4)),
    )
    loss, nll = sums[0] / count, sums[1] / count
    if balance is not None:
        assert config.experts is not None
        loss = loss + own / count * config.experts.balance_coef * moe.balance_loss(balance)
    return loss, {"nll": nll}
