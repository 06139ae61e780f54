"""The parameters of a decoder-only transformer: what arrays there are, their shapes, their start.

Layers are stacked: every array of a layer has a leading L, so that one `lax.scan` runs them all and
compile time does not grow with depth. Weights are stored [in, out] (Hugging Face stores [out, in]).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfra.model.config import ModelConfig

Leaf = Any  # jax.Array, numpy array or jax.ShapeDtypeStruct; None where a family has no such array


@struct.dataclass
class Attention:
    """Projections of one attention block, or of L stacked ones."""

    q: Leaf  # [L, D, N, H]
    k: Leaf  # [L, D, K, H]
    v: Leaf  # [L, D, K, H]
    o: Leaf  # [L, N, H, D]
    q_bias: Leaf = None  # [L, N, H]
    k_bias: Leaf = None  # [L, K, H]
    v_bias: Leaf = None  # [L, K, H]
    q_norm: Leaf = None  # [L, H]
    k_norm: Leaf = None  # [L, H]


@struct.dataclass
class MLP:
    """A gated feed-forward: down(act(gate(x)) * up(x))."""

    gate: Leaf  # [L, D, F]
    up: Leaf  # [L, D, F]
    down: Leaf  # [L, F, D]


@struct.dataclass
class MoE:
    """A router and E gated feed-forwards."""

    router: Leaf  # [L, D, E]
    gate: Leaf  # [L, E, D, F]
    up: Leaf  # [L, E, D, F]
    down: Leaf  # [L, E, F, D]


@struct.dataclass
class Layer:
    """One transformer layer, or L stacked ones."""

    attn_norm: Leaf  # [L, D]
    attn: Attention
    mlp_norm: Leaf  # [L, D]
    mlp: MLP | MoE
    post_attn_norm: Leaf = None  # [L, D], Gemma 3
    post_mlp_norm: Leaf = None  # [L, D], Gemma 3


@struct.dataclass
class Params:
    """All parameters of a model."""

    embed: Leaf  # [V, D]
    layers: Layer
    final_norm: Leaf  # [D]
    unembed: Leaf = None  # [D, V]; None where it is the embedding transposed


def abstract(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct`: shapes without memory."""
    c = config
    L, D, N, K, H, V = (
        c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size,
    )  # fmt: skip

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    if c.experts:
        E, F = c.experts.num_experts, c.experts.d_ff
        mlp = MoE(leaf(L, D, E), leaf(L, E, D, F), leaf(L, E, D, F), leaf(L, E, F, D))
    else:
        F = c.d_ff
        mlp = MLP(leaf(L, D, F), leaf(L, D, F), leaf(L, F, D))
    attn = Attention(
        q=leaf(L, D, N, H),
        k=leaf(L, D, K, H),
        v=leaf(L, D, K, H),
        o=leaf(L, N, H, D),
        q_bias=leaf(L, N, H) if c.qkv_bias else None,
        k_bias=leaf(L, K, H) if c.qkv_bias else None,
        v_bias=leaf(L, K, H) if c.qkv_bias else None,
        q_norm=leaf(L, H) if c.qk_norm else None,
        k_norm=leaf(L, H) if c.qk_norm else None,
    )
    return Params(
        embed=leaf(V, D),
        layers=Layer(
            attn_norm=leaf(L, D),
            attn=attn,
            mlp_norm=leaf(L, D),
            mlp=mlp,
            post_attn_norm=leaf(L, D) if c.post_norms else None,
            post_mlp_norm=leaf(L, D) if c.post_norms else None,
        ),
        final_norm=leaf(D),
        unembed=None if c.tie_embeddings else leaf(D, V),
    )


def init(key: jax.Array, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal, deviation 0.02, outputs of blocks divided by sqrt(2 L) (GPT-2).

    Norm weights start at one (zero where the config stores them minus one), biases at zero. Each
    leaf has a key of its own, folded from its path, so adding a parameter changes no other.
    """
    shapes, treedef = jax.tree_util.tree_flatten_with_path(abstract(config, dtype))

    def leaf(index: int, path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].name
        if name.endswith("norm"):
            return jnp.full(shape.shape, 0.0 if config.norm_plus_one else 1.0, dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape.shape, dtype)
        deviation = 0.02 / math.sqrt(2 * config.num_layers) if name in ("o", "down") else 0.02
        draw = jax.random.normal(jax.random.fold_in(key, index), shape.shape, jnp.float32)
        return (deviation * draw).astype(dtype)

    leaves = [leaf(i, path, shape) for i, (path, shape) in enumerate(shapes)]
    return jax.tree_util.tree_unflatten(treedef, leaves)
