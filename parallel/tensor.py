"""Tensor parallelism inside a block, as in Megatron-LM, and its sequence parallelism.

The first matrix of a pair is cut by columns (heads, feed-forward width), the second by rows, and
between them nothing is sent (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Around each pair:

    plain      enter: nothing     leave: all-reduce         backward: one all-reduce at `enter`
    sequence   enter: all-gather  leave: reduce-scatter     backward: the same two, transposed

Bytes are the same, 2 (n-1)/n of [B, T, D] a pair and direction; cut sequences hold 1/n of what lies
between the pairs (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2). The embedding and the
head are cut by vocabulary: each device looks up and scores its own words.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from parallel.mesh import Axis, ensure_varying, index, size, varying

TP = Axis.TP.value


def enter(x: Float[Array, "B t D"], sequence: bool) -> Float[Array, "B T D"]:
    """What a column-cut matrix takes: all positions.

    Without cut sequences x is the same on every device and typed so; the all-reduce of its gradient
    is the transpose of this cast to varying. Left to jax, each matrix would cast and reduce apart.
    """
    if size(TP) == 1:
        return x
    if not sequence:
        return ensure_varying(x, (TP,))
    return jax.lax.all_gather(x, TP, axis=1, tiled=True)


def leave(x: Float[Array, "B T D"], sequence: bool) -> Float[Array, "B t D"]:
    """The sum of what row-cut matrices gave, whole or each device's own positions."""
    if size(TP) == 1:
        return x
    if not sequence:
        return jax.lax.psum(x, TP)
    return jax.lax.psum_scatter(x, TP, scatter_dimension=1, tiled=True)


def embed(
    table: Float[Array, "v D"], config: ModelConfig, tokens: Int[Array, "B T"], sequence: bool
) -> Float[Array, "B t D"]:
    """Embeddings from a table cut by vocabulary: words of other devices give zeros to the sum."""
    if size(TP) == 1:
        return transformer.embed(table, config, tokens)
    here = tokens - index(TP) * table.shape[0]
    own = (here >= 0) & (here < table.shape[0])
    x = transformer.embed(table, config, jnp.where(own, here, 0))
    return leave(jnp.where(own[..., None], x, jnp.zeros_like(x)), sequence)


def cross_entropy(
    x: Float[Array, "M D"],
    w: Float[Array, "D v"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    config: ModelConfig,
    *,
    z_loss: float = 0.0,
    again: bool = True,
    block: int = 4096,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sums (loss with its z term, nll) over rows, from a head cut by vocabulary.

    The second has no gradient. Only three numbers a row are exchanged: the largest logit, the sum
    of exponentials, the target's logit (Megatron-LM's `vocab_parallel_cross_entropy`). At most
    `block` rows of logits live at a time, a quarter of them where that is less. The backward pass
    makes them `again` (8 M D V FLOPs in all), or the gradients are made with the loss (6 M D V, and
    w's gradient in float32).
    """
    M = x.shape[0]
    block = min(block, -(-M // 4))
    pad = -M % block
    rows = (
        jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, block, x.shape[1]),
        jnp.pad(targets, (0, pad)).reshape(-1, block),
        jnp.pad(weights, (0, pad)).reshape(-1, block),
    )
    head = _Head(config, z_loss)
    if not again:
        loss, nll = cast(Any, _with_gradients)(head, rows[0], w, *rows[1:])
        return loss, jax.lax.stop_gradient(nll)
    one = jax.checkpoint(lambda rows: head.sums(head.logits(rows[0], w), *rows[1:])[:2])
    loss, nll = jax.lax.map(one, rows)
    return jnp.sum(loss), jax.lax.stop_gradient(jnp.sum(nll))


@dataclasses.dataclass(frozen=True)
class _Head:
    """What a block of rows gives."""

    config: ModelConfig
    z_loss: float

    def logits(self, x: Float[Array, "b D"], w: Float[Array, "D v"]) -> Float[Array, "b v"]:
        """Of this device's words."""
        logits = jnp.einsum("md,dv->mv", x, w, preferred_element_type=jnp.float32)
        return transformer.cap_logits(logits, self.config)

    def sums(self, logits: Array, target: Array, weight: Array) -> tuple[Array, Array, Array]:
        """(loss, nll, log-sum-exp of every row) over all devices' words."""
        cut = size(TP) > 1
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        top = jax.lax.pmax(top, TP) if cut else top
        total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        here, own = self.at(logits, target)
        at = jnp.where(own, here, 0)[:, None]
        hit = jnp.where(own, jnp.take_along_axis(logits, at, axis=-1)[:, 0], 0.0)
        total, hit = jax.lax.psum((total, hit), TP) if cut else (total, hit)
        lse = top + jnp.log(total)
        nll = jnp.sum(weight * (lse - hit))
        return nll + self.z_loss * jnp.sum(weight * lse**2), nll, lse

    def at(self, logits: Array, target: Array) -> tuple[Array, Array]:
        """Targets' places among this device's words, and whether they are of them."""
        here = target - index(TP) * logits.shape[1]
        return here, (here >= 0) & (here < logits.shape[1])

    def slope(self, logits: Array, target: Array, weight: Array, lse: Array) -> Array:
        """The derivative of a block's loss by x w."""
        here, own = self.at(logits, target)
        hit = own[:, None] & (here[:, None] == jnp.arange(logits.shape[1]))
        share = (1.0 + 2.0 * self.z_loss * lse)[:, None] * jnp.exp(logits - lse[:, None])
        slope = weight[:, None] * (share - hit.astype(share.dtype))
        if (cap := self.config.logit_soft_cap) is not None:
            slope = slope * (1.0 - (logits / cap) ** 2)
        return slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradients(
    head: _Head, x: Float[Array, "n b D"], w: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    sums = jax.lax.map(
        lambda rows: head.sums(head.logits(rows[0], w), *rows[1:])[:2], (x, targets, weights)
    )
    return jnp.sum(sums[0]), jnp.sum(sums[1])


def _forward(head: _Head, x: Array, w: Array, targets: Array, weights: Array) -> tuple:
    def one(dw: Array, rows: tuple) -> tuple[Array, tuple]:
        x, target, weight = rows
        logits = head.logits(x, w)
        loss, nll, lse = head.sums(logits, target, weight)
        dz = head.slope(logits, target, weight, lse).astype(x.dtype)
        dx = jnp.einsum("mv,dv->md", dz, w)
        dw = dw + jnp.einsum("md,mv->dv", x, dz, preferred_element_type=jnp.float32)
        return dw, (loss, nll, dx)

    none = ensure_varying(jnp.zeros(w.shape, jnp.float32), varying(x) | varying(w))
    dw, (loss, nll, dx) = jax.lax.scan(one, none, (x, targets, weights))
    return (jnp.sum(loss), jnp.sum(nll)), (dx, dw.astype(w.dtype))


def _backward(head: _Head, gradients: tuple, cotangents: tuple) -> tuple:
    scale = cotangents[0]
    dx, dw = ((a.astype(jnp.float32) * scale).astype(a.dtype) for a in gradients)
    return dx, dw, None, None


_with_gradients.defvjp(_forward, _backward)
