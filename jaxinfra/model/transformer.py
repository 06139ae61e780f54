"""The forward pass of every supported family: pre-norm blocks of attention and feed-forward.

Cost: `jaxinfra.model.counts` counts it operation by operation; about 2 FLOPs a parameter and token
forward, and 4 N H FLOPs a query-key pair and layer for attention. Layers run in one `lax.scan`, so
compile time does not grow with depth; `remat` says what the backward pass keeps.

    python -m jaxinfra roofline qwen3-0.6b
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxinfra.errors import UserError
from jaxinfra.model import moe, quantized, rope
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.low_rank import product
from jaxinfra.model.params import Attention, Layer, MoE, Params
from pallas_kernels import add_rms_norm, attention, norm_rope, rms_norm

REMAT = {
    "none": "keep everything that differentiation asks for",
    "matmuls": "keep what matrix products and attention gave; recompute what is elementwise",
    "attention": "keep attention's inputs and output; recompute the projections and feed-forward",
    "full": "keep each layer's input",
}


def norm(
    x: Float[Array, "*rows D"], weight: Float[Array, "*#rows D"], config: ModelConfig
) -> Float[Array, "*rows D"]:
    """RMSNorm in x's dtype, computed in float32: so is the weight's gradient."""
    return rms_norm(x, weight, **_options(config))


def _options(config: ModelConfig) -> dict[str, Any]:
    return {
        "eps": config.norm_eps, "plus_one": config.norm_plus_one, "implementation": config.norms
    }  # fmt: skip


def add_norm(
    x: Array, out: Array, post_norm: Array | None, weight: Array, config: ModelConfig
) -> tuple[Array, Array]:
    """`residual`, and the next block's `norm` of it."""
    out = out if post_norm is None else norm(out, post_norm, config)
    return add_rms_norm(x, out, weight, **_options(config))


def activation(config: ModelConfig) -> Callable[[Array], Array]:
    """The feed-forward's non-linearity."""
    if config.activation == "gelu_tanh":
        return functools.partial(jax.nn.gelu, approximate=True)
    return jax.nn.silu


def project_qkv(attn: Attention, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
    """Queries [B,T,N,H], keys and values [B,T,K,H] before norms and rotation."""
    q = product("btd,dnh->btnh", x, attn.q)
    k = product("btd,dkh->btkh", x, attn.k)
    v = product("btd,dkh->btkh", x, attn.v)
    if attn.q_bias is not None:
        q, k, v = q + attn.q_bias, k + attn.k_bias, v + attn.v_bias
    return q, k, v


def rotate_qk(
    attn: Attention, q: Array, k: Array, config: ModelConfig, cos_sin: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Queries and keys after their norms (where the family has them) and rotation."""
    norms = (attn.q_norm, attn.k_norm) if config.qk_norm else ()
    return norm_rope(q, k, *cos_sin, *norms, **_options(config))


def feed_forward(
    layer: Layer, x: Float[Array, "B T D"], config: ModelConfig, real: Array | None = None
) -> tuple[Float[Array, "B T D"], moe.Balance | None]:
    """The dense or mixture-of-experts feed-forward."""
    if isinstance(layer.mlp, MoE):
        assert config.experts is not None
        return moe.feed_forward(layer.mlp, x, config.experts, activation(config), real)
    gate = checkpoint_name(product("btd,df->btf", x, layer.mlp.gate), "matmul")
    up = checkpoint_name(product("btd,df->btf", x, layer.mlp.up), "matmul")
    return product("btf,fd->btd", activation(config)(gate) * up, layer.mlp.down), None


def residual(x: Array, out: Array, post_norm: Array | None, config: ModelConfig) -> Array:
    """x plus a block's output, normed first where the family does (Gemma 3)."""
    return x + (out if post_norm is None else norm(out, post_norm, config))


def embed(
    table: Float[Array, "V D"], config: ModelConfig, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Token embeddings, scaled where the family does."""
    x = _look_up(table, tokens)
    if config.embed_scale is not None:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    return x


@jax.custom_vjp
def _look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the table; their gradients are summed in float32.

    A frequent token's gradient is the sum of thousands of small terms, which bfloat16 loses.
    """
    return table[tokens]


def _look_up_forward(table, tokens):
    return table[tokens], (table, tokens)


def _look_up_backward(residuals, gradient):
    table, tokens = residuals  # of the table, which lives anyway, only shape and dtype are used
    total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return total.astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def unembedding(params: Params) -> Float[Array, "D V"]:
    """The matrix of the language-model head."""
    if params.unembed is None:
        return params.embed.T
    return quantized.dense(params.unembed, params.embed.dtype)


def head(params: Params, config: ModelConfig, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits of hidden states that have passed the final norm."""
    logits = jnp.einsum("btd,dv->btv", x, unembedding(params), preferred_element_type=jnp.float32)
    return cap_logits(logits, config)


def cap_logits(logits: Float[Array, "B T V"], config: ModelConfig) -> Float[Array, "B T V"]:
    """Logits kept softly under the cap of the families that have one."""
    cap = config.logit_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def positions_of(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that start at zero in every segment of a packed row."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(start, axis=1)


def hidden(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    remat: str = "none",
    unroll: int = 1,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], moe.Balance | None]:
    """Hidden states after the final norm, and the router statistics of a mixture of experts.

    Args:
      segment_ids: documents packed into a row see only themselves; 0 marks padding, left or right.
      positions: for rotation; by default they start at zero in every segment.
      remat: a key of REMAT, what the backward pass keeps of each layer.
      unroll: layers a step of the scan.
      implementation: of attention, one of pallas_kernels.flash_attention.IMPLEMENTATIONS.
    """
    x, balance, _ = _layers(
        params, config, tokens, segment_ids, positions, remat, unroll, implementation
    )
    return x, balance


def hidden_keys_values(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Float[Array, "L B T K H"], Float[Array, "L B T K H"]]:
    """Hidden states after the final norm, and what a cache keeps of every layer."""
    x, _, (keys, values) = _layers(params, config, tokens, keep=True)
    return x, keys, values


def _layers(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    remat: str = "none",
    unroll: int = 1,
    implementation: str | None = None,
    *,
    keep: bool = False,
) -> tuple[Array, moe.Balance | None, Any]:
    """`hidden`, and keys and values where they are to be kept."""
    if remat not in REMAT:
        raise UserError(f"remat={remat!r}: choose one of {', '.join(REMAT)}")
    if tokens.shape[1] > config.max_seq_len:
        raise UserError(
            f"tokens: T={tokens.shape[1]} exceeds max_seq_len={config.max_seq_len}; "
            "raise it in the config or truncate"
        )
    if positions is None:
        if segment_ids is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        else:
            positions = positions_of(segment_ids)
    ropes = _rope_tables(config, positions)
    real = None if segment_ids is None else (segment_ids > 0).astype(jnp.float32)

    def before(x: Array, layer: Layer, cos_sin: tuple) -> tuple[Array, Array, Array]:
        q, k, v = project_qkv(layer.attn, norm(x, layer.attn_norm, config))
        q, k = checkpoint_name(q, "matmul"), checkpoint_name(k, "matmul")
        return *rotate_qk(layer.attn, q, k, config, cos_sin), v

    def after(x: Array, out: Array, layer: Layer) -> tuple[Array, moe.Balance | None]:
        out = checkpoint_name(product("btnh,nhd->btd", out, layer.attn.o), "matmul")
        x, h = add_norm(x, out, layer.post_attn_norm, layer.mlp_norm, config)
        out, balance = feed_forward(layer, h, config, real)
        return residual(x, out, layer.post_mlp_norm, config), balance

    # Where no loop is between a layer and its copy, XLA would take them for the same.
    apart = unroll > 1
    # Attention stands outside these two, so that what its own backward pass needs is kept.
    if remat in ("matmuls", "attention"):
        names = ("matmul",) if remat == "matmuls" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        before = jax.checkpoint(before, policy=policy, prevent_cse=apart)
        after = jax.checkpoint(after, policy=policy, prevent_cse=apart)

    def block(x: Array, scanned: tuple[Layer, Any]) -> tuple[Array, tuple]:
        layer, window = scanned
        layer = quantized.dense(layer, x.dtype)
        cos_sin, window = _of_layer(config, ropes, window)
        q, k, v = before(x, layer, cos_sin)
        out = attention(
            q, k, v, causal=True, window=window, segment_ids=segment_ids, scale=config.scale,
            implementation=implementation,
        )  # fmt: skip
        x, balance = after(x, out, layer)
        return x, (balance, (k, v) if keep else None)

    if remat == "full":
        block = jax.checkpoint(block, prevent_cse=apart)
    windows = _window_array(config)
    x = embed(params.embed, config, tokens)
    x, (balance, kept) = jax.lax.scan(block, x, (params.layers, windows), unroll=unroll)
    return norm(x, params.final_norm, config), balance, kept


def forward(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], **options: Any
) -> Float[Array, "B T V"]:
    """Float32 logits of every position; `options` are those of `hidden`."""
    return head(params, config, hidden(params, config, tokens, **options)[0])


def _rope_tables(config: ModelConfig, positions: Array) -> tuple:
    """(cos, sin) of full layers and of windowed ones; the same pair twice where they agree."""
    full = rope.table(config.rope, config.head_dim, positions)
    if config.rope_local is None:
        return full, full
    return full, rope.table(config.rope_local, config.head_dim, positions)


def _window_array(config: ModelConfig) -> Array | None:
    """One window a layer, for the scan; 0 where a layer sees everything; None if all are alike."""
    if config.windows is None or len(set(config.windows)) == 1:
        return None
    return jnp.asarray([w or 0 for w in config.windows], jnp.int32)


def _of_layer(config: ModelConfig, ropes: tuple, window: Array | None) -> tuple:
    """The rotation table and the attention window of one layer of the scan."""
    if window is None:
        fixed = config.window(0)
        return ropes[0 if fixed is None else 1], fixed
    cos_sin = jax.tree.map(lambda full, local: jnp.where(window > 0, local, full), *ropes)
    return cos_sin, jnp.where(window > 0, window, config.max_seq_len + 1)
