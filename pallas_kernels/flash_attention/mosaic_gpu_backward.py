"""Gradients of attention on Hopper, by one kernel of five products or by two of seven.

The weights p come again from the forward's log-sum-exp. The derivative by the logits is
p * (dout v^T - delta), where delta is the row sum of out * dout, less the cotangent of the
log-sum-exp, whose own derivative is p.

The one kernel goes over keys and adds its parts of dq in global memory, in whatever order they
come: 10 H FLOPs for each visible pair of a query head and a key. With two, one of the queries and
one of the keys and values, every warpgroup owns rows of what it makes, so all sums have one order
and the bits are the same in every run; both make the logits and dout v^T: 14 H. Heads of 256, and
jax 0.10, take the two in any case. Nothing of size [T, S] is written. Formula: arXiv 2307.08691.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _compat
from pallas_kernels.flash_attention.mosaic_gpu_backward_keys import of_keys
from pallas_kernels.flash_attention.mosaic_gpu_backward_queries import of_queries
from pallas_kernels.flash_attention.mosaic_gpu_config import (
    FUSED_CONFIGS,
    KEY_CONFIGS,
    LOG2E,
    QUERY_CONFIGS,
    KeyConfig,
    QueryConfig,
    Rule,
)


def gradients(
    rule: Rule,
    deterministic: bool,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    dout: Float[Array, "B T N H"],
    dlse: Float[Array, "B N T"],
    extra: dict[str, Array],
    *,
    configs: tuple[QueryConfig | None, KeyConfig] | None = None,
) -> tuple[tuple[Array, Array, Array], dict[str, Array]]:
    """The cotangents of q, k and v, and of the sinks if there are any.

    T and S are multiples of 8, H is 64, 128 or 256. `extra` holds what the call has of offset [B],
    window [1], sinks [N], q_segments [B, T or more] and kv_segments [B, S or more].
    """
    of_q, of_k = configs or _configs(q.shape[3], deterministic)
    query_tile, key_tile = of_k.block_q, of_k.groups * of_k.block_kv
    if of_q is not None:
        query_tile = math.lcm(query_tile, of_q.warpgroups * of_q.block_q)
        key_tile = math.lcm(key_tile, of_q.block_kv)

    blind = lse == -jnp.inf  # rows that see nothing; with +inf their weights are zero
    products = out.astype(jnp.float32) * dout.astype(jnp.float32)
    delta = jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2) - dlse
    delta = jnp.where(blind, 0.0, delta)
    base_2 = jnp.where(blind, jnp.inf, lse * LOG2E)
    statistics = _up_to(base_2, 2, query_tile, jnp.inf), _up_to(delta, 2, query_tile)

    masks = {name: x for name, x in extra.items() if name != "sinks"}
    if "q_segments" in masks:
        masks["q_segments"] = _up_to(masks["q_segments"], 1, query_tile)
        masks["kv_segments"] = _up_to(masks["kv_segments"], 1, key_tile)
    arguments = (q, k, v, dout, *statistics, masks)
    dk, dv, *fused = of_keys(rule, of_k, *arguments)
    if of_q is None:
        dq = (fused[0] * rule.scale).astype(q.dtype)
    else:
        dq = of_queries(rule, of_q, *arguments)

    of_sinks = {}
    if "sinks" in extra:
        taken = jnp.where(blind, 0.0, jnp.exp(extra["sinks"][:, None] - lse))
        of_sinks["sinks"] = -jnp.sum(taken * delta, axis=(0, 2))
    return (dq, dk, dv), of_sinks


def _configs(H: int, deterministic: bool) -> tuple[QueryConfig | None, KeyConfig]:
    fused = H in FUSED_CONFIGS and _compat.MUTABLE_UNDER_CUSTOM_VMAP
    if deterministic or not fused:
        return QUERY_CONFIGS[H], KEY_CONFIGS[H]
    return None, FUSED_CONFIGS[H]


def _up_to(x: Array, axis: int, multiple: int, value: float = 0) -> Array:
    """`x` with `value` after an axis's end, which comes to a multiple."""
    beyond = -x.shape[axis] % multiple
    widths = [(0, beyond if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if beyond else x
