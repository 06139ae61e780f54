"""Target logit, log-sum-exp and entropy of a linear layer's rows, with their gradient.

Forward, the parts of the vocabulary say their numbers and `blocks.merge` joins them; backward, the
logits are made again, block by block. Either is done by XLA or by the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cross_entropy import blocks, mosaic_gpu
from pallas_kernels.cross_entropy.blocks import Rule

Rows = tuple[Float[Array, " M"], Float[Array, " M"], Float[Array, " M"]]


@dataclasses.dataclass(frozen=True)
class Call:
    """Who computes, by which schedule; `block`: columns of XLA's blocks, None to choose."""

    implementation: str
    rule: Rule
    block: int | None = None
    schedule: mosaic_gpu.Schedule = mosaic_gpu.DEFAULT
    interpret: Any = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics(call: Call, x: Float[Array, "M D"], w: Array, targets: Int[Array, " M"]) -> Rows:
    """Hit, log-sum-exp and entropy of each row; hit is 0 for a target outside [0, V)."""
    if call.implementation == "mosaic_gpu":
        config = call.schedule.forward
        parts = mosaic_gpu.statistics(call.rule, config, x, w, targets, interpret=call.interpret)
        return blocks.merge(parts)

    def body(start: Any, size: int, carry: None) -> tuple[None, Array]:
        part = call.rule.block(w, start, size)
        return carry, blocks.statistics(call.rule, x, part, targets - start)

    _, given = blocks.over(call.rule.words(w), _width(call, x), body, None)
    return blocks.merge(jnp.concatenate([jnp.swapaxes(part, 0, 1) for part in given], axis=1))


def _forward(call: Call, x: Array, w: Array, targets: Array) -> tuple[Rows, Any]:
    rows: Any = statistics(call, x, w, targets)
    return rows, (x, w, targets, rows[1], rows[2])


def _backward(call: Call, kept: Any, cotangents: Rows) -> tuple[Array, Array, None]:
    x, w, targets, lse, entropy = kept
    slopes = blocks.slopes_of(cotangents, lse, entropy)
    if call.implementation == "mosaic_gpu":
        config = call.schedule.backward
        derive: Any = functools.partial(
            mosaic_gpu.derivatives, call.rule, config, interpret=call.interpret
        )
        block = call.schedule.block
    else:
        derive, block = functools.partial(blocks.derivatives, call.rule), _width(call, x)
    dx, dw = blocks.gradients(call.rule, block, derive, x, w, targets, slopes)
    return dx, dw, None


def _width(call: Call, x: Array) -> int:
    return blocks.width(x.shape[0]) if call.block is None else call.block


statistics.defvjp(_forward, _backward)
