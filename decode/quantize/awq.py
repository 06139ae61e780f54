"""AWQ (arXiv 2306.00978): inputs that matter are scaled up before rounding, and back where they
come from; then each group's scale is clipped to what rounds its weights best.

W x = (W s)(x / s). The factors s = magnitude^a of the inputs are searched over a in 0, 1/20 .. 1
for the least error of the outputs, tr(E X^T X E^T) with E what rounding changes; 1 / s goes into
the norm before q, k, v and gate, up, into v before o (one factor for the query heads that share a
key head), into up before down. Cost: 21 roundings and 2 o i^2 FLOPs each, a matrix.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from decode.quantize.calibrate import Inputs, LayerInputs
from decode.quantize.matrices import each, matrix
from decode.quantize.weights import (
    Scheme,
    assembled,
    parted,
    scales_of,
    stored_float,
    stored_scale,
    values_of,
)
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import MLP, Layer
from jaxinfra.model.quantized import QuantizedMatrix

POWERS = 20
CLIPS = 11  # of a scale: 1, 0.95 .. 0.5


def quantize_layer(layer: Layer, inputs: LayerInputs, config: ModelConfig, scheme: Scheme) -> Layer:
    """The layer with its matrices quantised and the factors in the weights before them."""
    layer, inputs = scaled(layer, inputs, config, scheme)
    return each(layer, lambda w, name, shape: clipped(w, getattr(inputs, name), scheme, shape))


def scaled(
    layer: Layer, inputs: LayerInputs, config: ModelConfig, scheme: Scheme
) -> tuple[Layer, LayerInputs]:
    """A layer that computes the same, up to rounding, and its inputs."""
    attn, mlp = layer.attn, layer.mlp
    assert isinstance(mlp, MLP)
    K, H, N = config.num_kv_heads, config.head_dim, config.num_heads

    s, norm = _into_norm(
        layer.attn_norm, _factors([attn.q, attn.k, attn.v], inputs.qkv, scheme), config
    )
    q, k, v = (w * s[:, None, None] for w in (attn.q, attn.k, attn.v))
    qkv, attn_norm = _divided(inputs.qkv, s), norm

    shared = inputs.o.magnitude.reshape(K, N // K, H).mean(axis=1, keepdims=True)
    shared = jnp.broadcast_to(shared, (K, N // K, H)).reshape(-1)
    s = _factors([attn.o.reshape(N * H, -1)], Inputs(inputs.o.gram, shared), scheme)
    of_value = s.reshape(K, N // K, H)[:, 0]
    o, v = attn.o * s.reshape(N, H, 1), v / of_value
    bias = None if attn.v_bias is None else stored_float(attn.v_bias / of_value)
    of_o = _divided(inputs.o, s)

    s, mlp_norm = _into_norm(
        layer.mlp_norm, _factors([mlp.gate, mlp.up], inputs.gate_up, scheme), config
    )
    gate, up = mlp.gate * s[:, None], mlp.up * s[:, None]
    gate_up = _divided(inputs.gate_up, s)
    s = _factors([mlp.down], inputs.down, scheme)
    layer = Layer(
        attn_norm, dataclasses.replace(attn, q=q, k=k, v=v, o=o, v_bias=bias),
        mlp_norm, MLP(gate, up / s, mlp.down * s[:, None]),
        layer.post_attn_norm, layer.post_mlp_norm,
    )  # fmt: skip
    return layer, LayerInputs(qkv, of_o, gate_up, _divided(inputs.down, s))


def _factors(weights: list[Array], inputs: Inputs, scheme: Scheme) -> Float[Array, " i"]:
    """The factors of the inputs that all `weights`, [i, ..] each, have."""
    together = jnp.concatenate([matrix(w, 1) for w in weights])
    return _search(together, inputs, scheme, scheme.width(together.shape[1]))


@functools.partial(jax.jit, static_argnames=("scheme", "width"))
def _search(w: Float[Array, "o i"], inputs: Inputs, scheme: Scheme, width: int) -> Array:
    magnitude = jnp.maximum(inputs.magnitude / jnp.max(inputs.magnitude), 1e-4)

    def candidate(power: Array) -> tuple[Array, Array]:
        s = magnitude**power
        s = s * jax.lax.rsqrt(jnp.max(s) * jnp.min(s))
        groups = parted(w * s, width)
        scales = scales_of(groups, scheme)
        rounded = values_of(groups, scales, scheme) * scales[..., None]
        error = jnp.swapaxes(rounded, 0, 1).reshape(w.shape) / s - w
        return s, jnp.sum((error @ inputs.gram) * error)

    factors, errors = jax.lax.map(candidate, jnp.linspace(0.0, 1.0, POWERS + 1))
    return factors[jnp.argmin(errors)]


def _into_norm(
    norm: Array, s: Float[Array, " i"], config: ModelConfig
) -> tuple[Float[Array, " i"], Array]:
    """The factors, and the norm's weight over them; rounding of the latter is in the former."""
    one = 1.0 if config.norm_plus_one else 0.0
    divided = stored_float((one + norm) / s - one)
    usable = jnp.abs(one + divided) > 1e-6
    divided = jnp.where(usable, divided, norm)
    return jnp.where(usable, (one + norm) / (one + divided), 1.0), divided


def _divided(inputs: Inputs, s: Float[Array, " i"]) -> Inputs:
    return Inputs(inputs.gram / (s[:, None] * s), inputs.magnitude / s)


def clipped(
    w: Float[Array, "o i"], inputs: Inputs, scheme: Scheme, shape: tuple
) -> QuantizedMatrix:
    """The matrix with each group's scale times what makes the error of its own part least."""
    values, scales = _clip(w.astype(jnp.float32), inputs.gram, scheme, scheme.width(w.shape[1]))
    return assembled(values, scales, scheme, shape)


@functools.partial(jax.jit, static_argnames=("scheme", "width"))
def _clip(
    w: Float[Array, "o i"], gram: Float[Array, "i i"], scheme: Scheme, width: int
) -> tuple[Array, Array]:
    groups = parted(w, width)
    g = groups.shape[0]
    blocks = gram.reshape(g, width, g, width)
    blocks = jnp.stack([blocks[i, :, i] for i in range(g)])
    full = scales_of(groups, scheme)

    def candidate(share: Array) -> tuple[Array, Array]:
        scales = stored_scale(full * share)
        error = values_of(groups, scales, scheme) * scales[..., None] - groups
        return scales, jnp.sum(jnp.einsum("gon,gnm->gom", error, blocks) * error, axis=-1)

    scales, errors = jax.lax.map(candidate, jnp.linspace(1.0, 0.5, CLIPS))
    best = jnp.take_along_axis(scales, jnp.argmin(errors, axis=0)[None], axis=0)[0]
    return values_of(groups, best, scheme), best
