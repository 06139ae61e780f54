"""What the kernels of attention on Hopper are told before they are compiled."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LOG2E = math.log2(math.e)
SHARED_MEMORY = 232_448  # bytes that a block may have
SECTION_BYTES = 32 * 2**20  # what stays in the L2 cache while its heads run


@dataclasses.dataclass(frozen=True)
class Config:
    """The output: rows a warpgroup (64), keys a block, slots of each ring, warpgroups (2, 3)."""

    block_q: int = 64
    block_kv: int = 128
    slots: int = 2
    warpgroups: int = 3

    def shared_memory(self, H: int) -> int:
        """Bytes of queries, keys, values and log-sum-exps of a block."""
        rows = self.warpgroups * self.block_q
        return 2 * H * (rows + 2 * self.slots * self.block_kv) + 4 * rows


CONFIGS = {64: Config(), 128: Config(), 256: Config(block_kv=64, warpgroups=2)}


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """The gradient of q: rows a warpgroup, keys a block, slots of each ring, warpgroups."""

    block_q: int = 64
    block_kv: int = 64
    k_slots: int = 2
    v_slots: int = 2
    warpgroups: int = 2

    def shared_memory(self, H: int) -> int:
        """Bytes of a block's queries, their cotangents, keys and values."""
        rows = 2 * self.warpgroups * self.block_q
        return 2 * H * (rows + (self.k_slots + self.v_slots) * self.block_kv)


QUERY_CONFIGS = {
    64: QueryConfig(block_kv=128),
    128: QueryConfig(k_slots=3, v_slots=3),
    256: QueryConfig(v_slots=1),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What of a call is fixed when it is compiled; `S` keys, without padding."""

    causal: bool
    soft_cap: float | None
    scale: float
    S: int
    interpret: Any

    def weights(self, products: Array, lse: Array, axis: int) -> tuple[Array, Array]:
        """Weights and what the derivative by a product of q and k multiplies, but for the scale.

        `lse`: of each query, in base 2; queries lie along `axis`.
        """
        unit, slope = self.scale * LOG2E, None
        if self.soft_cap is not None:
            # tanh(x) = 1 - 2 / (1 + e^2x); the chip's own tanh has eleven bits.
            products = 1 - 2 / (1 + jnp.exp2(products * (2 * unit / self.soft_cap)))
            unit, slope = self.soft_cap * LOG2E, 1 - products * products
        rows = lax.broadcast_in_dim(lse, products.shape, (axis,))
        weights = jnp.exp2(products * unit - rows)
        return weights, weights if slope is None else weights * slope


def sections(heads: int, bytes_of_one: int, together: int = 1) -> int:
    """How many of `heads` run at a time so that what they share stays in the L2 cache."""
    fit = max(1, SECTION_BYTES // bytes_of_one) * together
    return math.gcd(heads, 2 ** int(math.log2(fit)))


@dataclasses.dataclass(frozen=True)
class KeyConfig:
    """The gradients of k and v: keys that a warpgroup has, or two `share`; queries a block, slots.

    `fused`: makes the gradient of queries too; of heads whose columns the warpgroups can divide.
    """

    block_kv: int = 64
    block_q: int = 64
    slots: int = 2
    warpgroups: int = 2
    share: bool = False
    fused: bool = False

    @property
    def groups(self) -> int:
        """Runs of `block_kv` keys that a block has."""
        return 1 if self.share else self.warpgroups

    def shared_memory(self, H: int) -> int:
        """Bytes of a block's keys, values, queries, their cotangents and statistics."""
        handed_over = 2 * self.block_kv * self.block_q if self.share else 0
        if self.fused:
            handed_over = self.warpgroups * self.block_q * (4 * self.block_kv + 4 * 64)
        ring = self.slots * self.block_q * (4 * H + 8)
        return 4 * H * self.groups * self.block_kv + ring + handed_over


KEY_CONFIGS = {64: KeyConfig(slots=4, warpgroups=3), 128: KeyConfig(), 256: KeyConfig(share=True)}
FUSED_CONFIGS = {64: KeyConfig(slots=4, fused=True), 128: KeyConfig(fused=True)}
