"""The model over pages: T new tokens of B sequences, each at its own position.

Cost: every weight is read once a step, whatever T; and the keys and values that attention reads
(`pallas_kernels.paged_attention`). Weights, norms, rotation and feed-forward are those of
`jaxinfra.model.cache`; what differs is where keys and values lie.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxinfra.model import cache as kv
from jaxinfra.model import rope
from jaxinfra.model import transformer as model
from jaxinfra.model.config import ModelConfig
from pallas_kernels import decode_layer as fused
from pallas_kernels import page_write
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
    axis: str | None = None,
) -> tuple[Float[Array, "T D"], tuple[LayerPages, ...]]:
    """Hidden states after the final norm, and the pages with the new keys and values in them.

    Row b's tokens are tokens[starts[b]:starts[b + 1]]; it has lengths[b] tokens with them.
    slots: page times size plus place of each token; below zero nothing is written.
    invariant, implementation: of `pallas_kernels.paged_attention`. axis: of devices that have parts
    of each layer (`decode.tensor`).
    """
    T = tokens.shape[0]
    whole = (lambda a: a) if axis is None else partial(jax.lax.psum, axis_name=axis)
    if T == table.shape[0] == 1 and not invariant and fused_refusal(params, config, pool) is None:
        return _one_token(params, config, pool, tokens, positions, slots, table[0], lengths)
    ropes = [rope.table(config.rope, config.head_dim, positions[None])]
    if config.rope_local is not None:
        ropes.append(rope.table(config.rope_local, config.head_dim, positions[None]))
    x = model.embed(params.embed, config, tokens[None])
    grown = []
    for i, (layer, pages) in enumerate(zip(params.layers, pool, strict=True)):
        window = config.window(i)
        attn = cast(kv.FusedAttention, layer.attn)
        h = model.norm(x, layer.attn_norm, config)
        q, pages = _write(attn, h, config, ropes[0 if window is None else -1], pages, slots)
        out = paged_attention(
            q, pages.k, pages.v, table, starts, lengths, scale=config.scale, window=window,
            k_scale=pages.k_scale, v_scale=pages.v_scale, invariant=invariant,
            implementation=implementation,
        )  # fmt: skip
        grown.append(pages)
        out = whole(kv.project(out.reshape(1, T, -1), attn.o))
        x = model.residual(x, out, layer.post_attn_norm, config)
        out = whole(kv.feed_forward(layer, model.norm(x, layer.mlp_norm, config), config))
        x = model.residual(x, out, layer.post_mlp_norm, config)
    return model.norm(x, params.final_norm, config)[0], tuple(grown)


def fused_refusal(
    params: kv.DecodeParams, config: ModelConfig, pool: tuple[LayerPages, ...]
) -> str | None:
    """Why a lone token does not go through each layer in one kernel, or None if it does."""
    if config.activation != "silu" or config.norm_plus_one or config.rope_local is not None:
        return "the kernel is for silu, plain norms and one rotation"
    if any(config.window(i) is not None for i in range(config.num_layers)):
        return "the kernel has no window"
    for layer, pages in zip(params.layers, pool, strict=True):
        if layer.post_attn_norm is not None or not isinstance(layer.mlp, kv.FusedMLP):
            return "the kernel is for two norms a layer and a dense feed-forward"
        if not isinstance(cast(kv.FusedAttention, layer.attn).qkv, jax.Array):
            return "the kernel takes no quantised weights"
        if reason := fused.supported(_weights(layer), pages.k.shape, pages.k.dtype):
            return reason
    return None


def _weights(layer: Any) -> fused.LayerWeights:
    return fused.LayerWeights(
        attn_norm=layer.attn_norm, qkv=layer.attn.qkv, o=layer.attn.o, mlp_norm=layer.mlp_norm,
        gate_up=layer.mlp.gate_up, down=layer.mlp.down, qkv_bias=layer.attn.qkv_bias,
        q_norm=layer.attn.q_norm, k_norm=layer.attn.k_norm,
    )  # fmt: skip


def _one_token(
    params: kv.DecodeParams,
    config: ModelConfig,
    pool: tuple[LayerPages, ...],
    tokens: Int[Array, " 1"],
    positions: Int[Array, " 1"],
    slots: Int[Array, " 1"],
    table: Int[Array, " M"],
    lengths: Int[Array, " 1"],
) -> tuple[Float[Array, "1 D"], tuple[LayerPages, ...]]:
    """`forward` of one token, a kernel a layer."""
    cos, sin = (a[0, 0, 0] for a in rope.table(config.rope, config.head_dim, positions[None]))
    embedded = model.embed(params.embed, config, tokens[None])[0, 0]
    facts = jnp.concatenate([lengths, slots])
    x, count = embedded.astype(jnp.float32), fused.counters(config.num_kv_heads)
    grown = []
    for layer, pages in zip(params.layers, pool, strict=True):
        x, k, v, count = fused.decode_layer(
            x, pages.k, pages.v, count, _weights(layer), cos, sin, table, facts,
            scale=config.scale, eps=config.norm_eps,
        )  # fmt: skip
        grown.append(LayerPages(k, v))
    x = model.norm(x.astype(embedded.dtype), params.final_norm, config)
    return x[None], tuple(grown)


def _write(
    attn: kv.FusedAttention,
    h: Float[Array, "1 T D"],
    config: ModelConfig,
    cos_sin: tuple[Array, Array],
    pages: LayerPages,
    slots: Int[Array, " T"],
) -> tuple[Float[Array, "T N H"], LayerPages]:
    """Queries, and the pages with the keys and values: in one kernel where it takes them."""
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if page_write.supported(h.dtype, width, pages.k.shape, pages.k.dtype) is None:
        cos, sin = (a[0, :, 0] for a in cos_sin)
        q, k, v = page_write.page_write(
            kv.project(h, attn.qkv)[0], pages.k, pages.v, cos, sin, slots,
            bias=cast(Any, attn.qkv_bias), eps=config.norm_eps, plus_one=config.norm_plus_one,
            norms=(attn.q_norm, attn.k_norm) if config.qk_norm else None,
        )  # fmt: skip
        return q, LayerPages(k, v)
    q, k, v = kv.queries_keys_values(attn, h, config, cos_sin)
    return q[0], _append(pages, k[0], v[0], slots)


def _append(pages: LayerPages, k: Array, v: Array, slots: Array) -> LayerPages:
    if pages.k_scale is None:
        return LayerPages(append(pages.k, k, slots), append(pages.v, v, slots))
    k, k_scale = append(pages.k, k, slots, pages.k_scale)
    v, v_scale = append(pages.v, v, slots, pages.v_scale)
    return LayerPages(k, v, k_scale, v_scale)
