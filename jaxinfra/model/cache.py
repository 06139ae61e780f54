"""Incremental forward with a contiguous key/value cache: T new tokens after those a row holds.

Cost of one decoded token: every weight is read once, and 2 S K H numbers of cache a layer and row,
S being the cache's capacity: ask for no more than is needed, `grow` makes room later.

Layers of a decode step are unrolled and each has arrays of its own, because a scan would copy a
layer's weights out of the stack at every step: with 64 rows it took 2.2 times the CPU time at two
layers of width 64, and 1.4 times at six of width 256. They are traced once, though, and `prefill`
of weights that are stacked, where the copy is small beside a prompt's work, is a scan. `unstack`
makes the unrolled form and merges the projections that share an input, so that a token costs four
matrix products a layer instead of seven; inside a program it does so in a loop.

Inside a device loop the cache is written in place. Measured with SmolLM2-135M's shape in float32 at
batch 1 on two busy CPU cores, best of ten turns: capacity 2,048 decodes 20.6 tokens/s against 12.1
where XLA copies the cache (a slice update), 256 decodes 21.3 against 19.6. One row with one
key/value head is still copied: XLA drops both axes of size one for the product and keeps them for
the loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxinfra.errors import UserError
from jaxinfra.model import matrix_first, quantized, rope
from jaxinfra.model import transformer as model
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import MLP, Layer, Leaf, Params
from pallas_kernels import attention, rms_norm


@struct.dataclass
class FusedAttention:
    """Attention whose three input projections are one matrix; the rest as in `Attention`."""

    qkv: Leaf  # [(N + 2K) H, D]
    o: Leaf  # [D, N H]
    qkv_bias: Leaf = None  # [(N + 2K) H]
    q_norm: Leaf = None  # [H]
    k_norm: Leaf = None  # [H]


@struct.dataclass
class FusedMLP:
    """A gated feed-forward whose two input projections are one matrix."""

    gate_up: Leaf  # [2 F, D]
    down: Leaf  # [D, F]


@struct.dataclass
class DecodeParams:
    """Parameters for incremental decoding: one `Layer` a layer, projections merged.

    Matrices lie as [out, in]: a vector at a time goes through them along memory.
    """

    embed: Leaf  # [V, D]
    layers: tuple[Layer, ...]
    final_norm: Leaf  # [D]
    unembed: Leaf  # [V, D], the embedding itself where it is tied


@struct.dataclass
class Cache:
    """Keys and values of every layer, and how many tokens each row holds."""

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]
    length: Int[Array, " B"]


def unstack(params: Params, config: ModelConfig) -> DecodeParams:
    """The same parameters, one layer apart from the other and with projections merged."""

    index, stack = range(config.num_layers), params.layers
    if isinstance(params.final_norm, Tracer):  # in a program: one merge, in a loop
        stack = jax.lax.map(_merge_layer, stack)
        layers = [jax.tree.map(lambda a, i=i: a[i], stack) for i in index]
    else:  # no second stack beside the first
        layers = [_merge_layer(jax.tree.map(lambda a, i=i: a[i], stack)) for i in index]
    return DecodeParams(
        embed=params.embed,
        layers=tuple(layers),
        final_norm=params.final_norm,
        unembed=params.embed if params.unembed is None else _merge([params.unembed], inputs=1),
    )


def _merge_layer(layer: Layer) -> Layer:
    a, mlp, bias = layer.attn, layer.mlp, None
    if a.q_bias is not None:
        bias = jnp.concatenate([b.reshape(-1) for b in (a.q_bias, a.k_bias, a.v_bias)])
    attn = FusedAttention(
        qkv=_merge([a.q, a.k, a.v], inputs=1),
        o=_merge([a.o], inputs=2),
        qkv_bias=bias,
        q_norm=a.q_norm,
        k_norm=a.k_norm,
    )
    if isinstance(mlp, MLP):
        mlp = FusedMLP(_merge([mlp.gate, mlp.up], inputs=1), _merge([mlp.down], inputs=1))
    return layer.replace(attn=attn, mlp=mlp)  # pyright: ignore[reportAttributeAccessIssue]


def _merge(weights: Sequence[Leaf], inputs: int) -> Leaf:
    """Weights whose first `inputs` axes are the same inputs, as one matrix [out, in]."""
    if quantized.is_quantized(weights[0]):
        return quantized.for_decoding(quantized.concatenate(weights))
    return jnp.concatenate([w.reshape(math.prod(w.shape[:inputs]), -1).T for w in weights])


def along_memory() -> bool:
    """Whether one token goes through a matrix by a multiply and a sum, as a GPU does it best.

    XLA fuses those with what stands before and after; a matrix product there is made for many rows.
    """
    return jax.default_backend() == "gpu"


def project(
    x: Float[Array, "B T i"],
    w: Float[Array, "o i"] | quantized.QuantizedMatrix,
    dtype: Any = None,
) -> Float[Array, "B T o"]:
    """x times the transpose of w; sums in float32, result in `dtype` or x's."""
    dtype = dtype or x.dtype
    if isinstance(w, quantized.QuantizedMatrix):
        return quantized.product(x, w, dtype)
    if x.shape[0] * x.shape[1] > 1 or not along_memory():
        y = matrix_first.product(x.reshape(-1, x.shape[-1]), w, dtype)
        return y.reshape(*x.shape[:2], -1)
    return jnp.sum(x.astype(jnp.float32) * w.astype(jnp.float32), axis=-1)[None].astype(dtype)


def empty(config: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> Cache:
    """A cache of `capacity` tokens a row, holding none."""
    if capacity > config.max_seq_len:
        raise UserError(
            f"cache: capacity={capacity} exceeds max_seq_len={config.max_seq_len}; "
            "ask for fewer tokens or raise it in the config"
        )
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    layers = range(config.num_layers)
    return Cache(
        k=tuple(jnp.zeros(shape, dtype) for _ in layers),
        v=tuple(jnp.zeros(shape, dtype) for _ in layers),
        length=jnp.zeros((batch,), jnp.int32),
    )


def grow(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` tokens a row."""
    more = capacity - cache.k[0].shape[2]
    return jax.tree.map(
        lambda a: a if a.ndim == 1 else jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))), cache
    )


def extend(
    params: DecodeParams,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    cache: Cache,
    *,
    lengths: Int[Array, " B"] | None = None,
    fresh: bool = False,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states (after the final norm) of T tokens that follow those in the cache.

    Args:
      lengths: how many of the T tokens of each row are real (the others stand at its end and are
        written over by the next call); all of them by default.
      fresh: the cache holds nothing yet: attention then looks at the T tokens alone and costs
        T x T, not T times the capacity.

    Positions past the cache's capacity are not checked here: the caller counts tokens.
    """
    B, T = tokens.shape
    positions = cache.length[:, None] + jnp.arange(T)[None, :]
    ropes = [rope.table(config.rope, config.head_dim, positions)]
    if config.rope_local is not None:
        ropes.append(rope.table(config.rope_local, config.head_dim, positions))
    x = model.embed(params.embed, config, tokens)
    write = _write_slice if along_memory() or T > 1 else _write_one
    windows = [config.window(i) for i in range(config.num_layers)]
    # What layers of a window share: its rotation and, of one token, the keys that it sees.
    shared = {
        w: (ropes[0 if w is None else -1], _seen(cache, w) if T == 1 else None)
        for w in set(windows)
    }

    @functools.partial(jax.jit, static_argnums=0)  # so that layers are traced once, not each
    def block(
        window: int | None, layer: Layer, x: Array, k: Array, v: Array, length: Array, shared: tuple
    ) -> tuple[Array, Array, Array]:
        cos_sin, seen = shared
        attn = cast(FusedAttention, layer.attn)
        h = model.norm(x, layer.attn_norm, config)
        q, new_k, new_v = queries_keys_values(attn, h, config, cos_sin)
        k, v = write(k, new_k, length), write(v, new_v, length)
        if fresh:
            out = attention(q, new_k, new_v, causal=True, window=window, scale=config.scale)
        elif seen is not None:
            out = _attend_one(q, k, v, seen, config)
        else:
            out = _attend(q, k, v, length, window, config)
        out = project(out.reshape(B, T, -1), attn.o)
        x = model.residual(x, out, layer.post_attn_norm, config)
        out = feed_forward(layer, model.norm(x, layer.mlp_norm, config), config)
        return model.residual(x, out, layer.post_mlp_norm, config), k, v

    keys, values = [], []
    for window, layer, k, v in zip(windows, params.layers, cache.k, cache.v, strict=True):
        x, k, v = block(window, layer, x, k, v, cache.length, shared[window])
        keys.append(k)
        values.append(v)
    grown = cache.length + (T if lengths is None else lengths)
    return model.norm(x, params.final_norm, config), Cache(tuple(keys), tuple(values), grown)


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "N T"],
    lengths: Int[Array, " N"],
    *,
    capacity: int,
    copies: int = 1,
) -> tuple[Float[Array, "N T D"], Cache]:
    """Hidden states of N prompts, `lengths` of whose tokens are real, and a cache that holds them.

    The layers run as the trainer runs them, in one scan. Each prompt has `copies` rows of the
    cache, which stand together. That `capacity` is within max_seq_len is not checked here.
    """
    x, keys, values = model.hidden_keys_values(params, config, tokens)

    @jax.jit  # traced once; layer by layer, so that no stack of whole caches exists
    def room(layer: Float[Array, "N T K H"]) -> Float[Array, "B K S H"]:
        layer = jnp.repeat(jnp.swapaxes(layer, 1, 2), copies, axis=0)
        return jnp.pad(layer, ((0, 0), (0, 0), (0, capacity - layer.shape[2]), (0, 0)))

    k, v = (tuple(room(layer) for layer in stack) for stack in (keys, values))
    return x, Cache(k, v, jnp.repeat(lengths, copies))


def head(
    params: DecodeParams, config: ModelConfig, x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Float32 logits of what `extend` gave."""
    return model.cap_logits(project(x, params.unembed, jnp.float32), config)


def queries_keys_values(
    attn: FusedAttention, x: Array, config: ModelConfig, cos_sin: tuple[Array, Array]
) -> list[Array]:
    """Queries and keys, normed and rotated together in as few operations as can be, and values."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    y = project(x, attn.qkv)
    if attn.qkv_bias is not None:
        y = y + attn.qkv_bias
    qk, v = jnp.split(y.reshape(*x.shape[:2], N + 2 * K, H), [N + K], axis=2)
    qk = qk.astype(jnp.float32)
    if config.qk_norm:
        weights = [jnp.broadcast_to(attn.q_norm, (N, H)), jnp.broadcast_to(attn.k_norm, (K, H))]
        by_head = jnp.concatenate(weights)
        qk = rms_norm(qk, by_head, eps=config.norm_eps, plus_one=config.norm_plus_one)
    qk = rope.rotate(qk, cos_sin).astype(x.dtype)
    return [*jnp.split(qk, [N], axis=2), v]


def feed_forward(layer: Layer, x: Float[Array, "B T D"], config: ModelConfig) -> Array:
    """The feed-forward [B,T,D] of a layer of `DecodeParams`."""
    if not isinstance(layer.mlp, FusedMLP):
        return model.feed_forward(layer, x, config)[0]
    gate, up = jnp.split(project(x, layer.mlp.gate_up), 2, axis=-1)
    return project(model.activation(config)(gate) * up, layer.mlp.down)


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    length: Int[Array, " B"],
    window: int | None,
    config: ModelConfig,
) -> Float[Array, "B T N H"]:
    """Attention of T queries, the first at position `length`, to the keys up to their own."""
    return attention(
        q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), causal=True, window=window,
        scale=config.scale, q_offset=length,
    )  # fmt: skip


def _seen(cache: Cache, window: int | None) -> Bool[Array, "B S"]:
    """Which places of the cache a row's next token looks at, its own included."""
    position, length = jnp.arange(cache.k[0].shape[2]), cache.length[:, None]
    seen = position <= length
    return seen if window is None else seen & (position > length - window)


def _attend_one(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    seen: Bool[Array, "B S"],
    config: ModelConfig,
) -> Float[Array, "B K G H"]:
    """`_attend` of one query a row, reading the cache as it lies."""
    B, _, N, H = q.shape
    grouped = q.reshape(B, k.shape[1], N // k.shape[1], H)
    if along_memory():
        products = grouped[:, :, :, None].astype(jnp.float32) * k[:, :, None].astype(jnp.float32)
        logits = jnp.sum(products, axis=-1)
    else:
        logits = jnp.einsum("bkgh,bksh->bkgs", grouped, k, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, None, None], logits * config.scale, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    if along_memory():
        out = jnp.sum(weights[..., None] * v[:, :, None].astype(jnp.float32), axis=3)
        return out.astype(q.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(v.dtype), v)


def _write_one(
    cached: Float[Array, "B K S H"], new: Float[Array, "B 1 K H"], start: Int[Array, " B"]
) -> Float[Array, "B K S H"]:
    """`_write_slice` of one token by a scatter, which XLA:CPU does in place.

    Of a slice update inside a loop it makes two and copies the cache for both.
    """
    B, K = cached.shape[:2]
    # Places without a sign are not looked at for one that counts from the end.
    row, head = jnp.arange(B, dtype=jnp.uint32)[:, None], jnp.arange(K, dtype=jnp.uint32)
    place = start.astype(jnp.uint32)[:, None]
    return cached.at[row, head, place].set(new[:, 0].astype(cached.dtype), mode="drop")


def _write_slice(
    cached: Float[Array, "B K S H"], new: Float[Array, "B T K H"], start: Int[Array, " B"]
) -> Float[Array, "B K S H"]:
    """The cache with `new` put into each row at its own position."""
    new = jnp.swapaxes(new, 1, 2).astype(cached.dtype)
    if cached.shape[0] == 1:
        return jax.lax.dynamic_update_slice(cached, new, (0, 0, start[0], 0))
    return jax.vmap(lambda c, n, s: jax.lax.dynamic_update_slice(c, n, (0, s, 0)))(
        cached, new, start
    )
