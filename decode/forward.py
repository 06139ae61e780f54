"""The model over pages: T new tokens of B sequences, each at its own position.

Cost: every weight is read once a step, whatever T; and the keys and values that attention reads
(`pallas_kernels.paged_attention`). Weights, norms, rotation and feed-forward are those of
`jaxinfra.model.cache`; what differs is where keys and values lie.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxinfra.model import cache as kv
from jaxinfra.model import rope
from jaxinfra.model import transformer as model
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from pallas_kernels.paged_attention import append, paged_attention

QUANTISED = ("int8", "float8_e4m3fn")


@struct.dataclass
class LayerPages:
    """Keys and values of a layer in P pages, with a scale a token and head where quantised."""

    k: Array  # [P, K, page, H]
    v: Array
    k_scale: Array | None = None  # [P, K, page], float32
    v_scale: Array | None = None


def empty(config: ModelConfig, pages: int, size: int, dtype: str) -> tuple[LayerPages, ...]:
    """Pages of `size` tokens for every layer. dtype: a float's, or one of QUANTISED."""
    shape = (pages, config.num_kv_heads, size, config.head_dim)

    def layer() -> LayerPages:
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        if dtype not in QUANTISED:
            return LayerPages(k, v)
        return LayerPages(k, v, jnp.ones(shape[:3], jnp.float32), jnp.ones(shape[:3], jnp.float32))

    return tuple(layer() for _ in range(config.num_layers))


def copy(
    pool: tuple[LayerPages, ...], source: Int[Array, " n"], target: Int[Array, " n"]
) -> tuple[LayerPages, ...]:
    """`pool` with whole pages copied; a target below zero copies nothing."""

    def one(pages: Array) -> Array:
        at = jnp.where(target < 0, pages.shape[0], target)
        return pages.at[at].set(pages[jnp.maximum(source, 0)], mode="drop")

    return jax.tree.map(one, pool)


def forward(
    params: kv.DecodeParams,
    config: ModelConfig,
    pool: tuple[LayerPages, ...],
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    slots: Int[Array, " T"],
    table: Int[Array, "B M"],
    starts: Int[Array, " B+1"],
    lengths: Int[Array, " B"],
    *,
    invariant: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "T D"], tuple[LayerPages, ...]]:
    """Hidden states after the final norm, and the pages with the new keys and values in them.

    Row b's tokens are tokens[starts[b]:starts[b + 1]]; it has lengths[b] tokens with them.
    slots: page times size plus place of each token; below zero nothing is written.
    invariant, implementation: of `pallas_kernels.paged_attention`.
    """
    T = tokens.shape[0]
    ropes = [rope.table(config.rope, config.head_dim, positions[None])]
    if config.rope_local is not None:
        ropes.append(rope.table(config.rope_local, config.head_dim, positions[None]))
    x = model.embed(cast(Params, params), config, tokens[None])
    grown = []
    for i, (layer, pages) in enumerate(zip(params.layers, pool, strict=True)):
        window = config.window(i)
        attn = cast(kv.FusedAttention, layer.attn)
        h = model.norm(x, layer.attn_norm, config)
        q, k, v = kv.queries_keys_values(attn, h, config, ropes[0 if window is None else -1])
        pages = _append(pages, k[0], v[0], slots)
        out = paged_attention(
            q[0], pages.k, pages.v, table, starts, lengths, scale=config.scale, window=window,
            k_scale=pages.k_scale, v_scale=pages.v_scale, invariant=invariant,
            implementation=implementation,
        )  # fmt: skip
        grown.append(pages)
        out = kv.project(out.reshape(1, T, -1), attn.o)
        x = model.residual(x, out, layer.post_attn_norm, config)
        out = kv.feed_forward(layer, model.norm(x, layer.mlp_norm, config), config)
        x = model.residual(x, out, layer.post_mlp_norm, config)
    return model.norm(x, params.final_norm, config)[0], tuple(grown)


def _append(pages: LayerPages, k: Array, v: Array, slots: Array) -> LayerPages:
    if pages.k_scale is None:
        return LayerPages(append(pages.k, k, slots), append(pages.v, v, slots))
    k, k_scale = append(pages.k, k, slots, pages.k_scale)
    v, v_scale = append(pages.v, v, slots, pages.v_scale)
    return LayerPages(k, v, k_scale, v_scale)
