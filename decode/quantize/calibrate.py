"""Calibration: real text, and what goes into each matrix of a layer when the model reads it.

Of the inputs X [tokens, i] of a matrix, GPTQ and AWQ need the products X^T X [i, i] and the mean
magnitudes [i] alone. Layers are taken one after the other, each with the inputs that the quantised
layers before it give. Cost: two forward passes over the text, 4 i^2 FLOPs a token and matrix input.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxinfra.errors import UserError
from jaxinfra.model import rope
from jaxinfra.model import transformer as model
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import MLP, Layer
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train import corpus
from pallas_kernels.flash_attention import attention

PIECE = 4096  # characters: a piece of text is all calibration or all held out
HELD_OUT = 8  # one piece in so many


@struct.dataclass
class Inputs:
    """What is kept of the inputs of a matrix, summed over tokens."""

    gram: Float[Array, "i i"]
    magnitude: Float[Array, " i"]


@struct.dataclass
class LayerInputs:
    """Of each matrix of a layer; q, k and v have the same, and gate and up."""

    qkv: Inputs
    o: Inputs
    gate_up: Inputs
    down: Inputs


def windows(
    data: str, tokenizer: Tokenizer, *, count: int, length: int, held_out: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` windows of text to calibrate on and `held_out` others, int32 [windows, length].

    `data` is "stdlib", a file, a folder or hf:OWNER/NAME. Pieces of the text are taken in a
    random order, always the same, so that a short calibration sees all of it. Raises UserError
    where text is missing.
    """
    pieces = []
    for document in corpus.find(data).documents():
        pieces += [document[i : i + PIECE] for i in range(0, len(document), PIECE)]
    apart = pieces[HELD_OUT - 1 :: HELD_OUT]
    del pieces[HELD_OUT - 1 :: HELD_OUT]
    parts = []
    for name, text, wanted in (("calibration", pieces, count), ("held-out", apart, held_out)):
        ids = _first(text, tokenizer, wanted * length)
        if len(ids) < wanted * length:
            raise UserError(
                f"{data}: {len(ids):,} tokens of {name} text, {wanted * length:,} are needed; give "
                "more text (one eighth is held out) or ask for fewer --windows"
            )
        parts.append(np.asarray(ids[: wanted * length], np.int32).reshape(wanted, length))
    return parts[0], parts[1]


def _first(pieces: list[str], tokenizer: Tokenizer, wanted: int) -> list[int]:
    """At least `wanted` tokens, if there are so many, of pieces from everywhere."""
    ids: list[int] = []
    for i in np.random.default_rng(0).permutation(len(pieces)):
        if len(ids) >= wanted:
            break
        ids += tokenizer.encode(pieces[i], add_special=False)
    return ids


def layer_of(layers: Layer, index: int) -> Layer:
    """One of stacked layers."""
    return jax.tree.map(lambda a: a[index], layers)


@functools.partial(jax.jit, static_argnames=("config", "index"))
def _run(
    layer: Layer, x: Float[Array, "B T D"], config: ModelConfig, index: int
) -> tuple[Float[Array, "B T D"], LayerInputs]:
    window, mlp = config.window(index), layer.mlp
    assert isinstance(mlp, MLP)
    local = config.rope_local if window is not None and config.rope_local else config.rope
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    h = model.norm(x, layer.attn_norm, config)
    q, k, v = model.project_qkv(layer.attn, h)
    cos_sin = rope.table(local, config.head_dim, positions)
    q, k = model.rotate_qk(layer.attn, q, k, config, cos_sin)
    mixed = attention(q, k, v, causal=True, window=window, scale=config.scale)
    out = jnp.einsum("btnh,nhd->btd", mixed, layer.attn.o)
    x = model.residual(x, out, layer.post_attn_norm, config)
    g = model.norm(x, layer.mlp_norm, config)
    gate = jnp.einsum("btd,df->btf", g, mlp.gate)
    acted = model.activation(config)(gate) * jnp.einsum("btd,df->btf", g, mlp.up)
    x = model.residual(x, jnp.einsum("btf,fd->btd", acted, mlp.down), layer.post_mlp_norm, config)
    return x, LayerInputs(*map(_kept, (h, mixed, g, acted)))


@functools.partial(jax.jit, static_argnames=("config", "index"))
def _advance(layer: Layer, x: Array, config: ModelConfig, index: int) -> Array:
    return _run(layer, x, config, index)[0]


def _kept(x: Float[Array, "B T ..."]) -> Inputs:
    rows = x.reshape(x.shape[0] * x.shape[1], -1).astype(jnp.float32)
    gram = jnp.einsum("ti,tj->ij", rows, rows, precision=jax.lax.Precision.HIGHEST)
    return Inputs(gram, jnp.sum(jnp.abs(rows), axis=0))


class Calibration:
    """Windows of text on their way through the layers, a batch at a time."""

    def __init__(self, table: Any, config: ModelConfig, tokens: Int[Array, "n T"], batch: int = 4):
        self._config = config
        self._x = [
            model.embed(table, config, jnp.asarray(tokens[i : i + batch]))
            for i in range(0, len(tokens), batch)
        ]

    def inputs(self, layer: Layer, index: int) -> LayerInputs:
        """What goes into the matrices of a layer of floats at the place `index`."""
        kept = [_run(layer, x, self._config, _alike(self._config, index))[1] for x in self._x]
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *kept)

    def advance(self, layer: Layer, index: int) -> None:
        """The text goes through the layer, which is one of floats."""
        index = _alike(self._config, index)
        self._x = [_advance(layer, x, self._config, index) for x in self._x]


def _alike(config: ModelConfig, index: int) -> int:
    """The first layer with the same window: they share a program."""
    return [config.window(i) for i in range(index + 1)].index(config.window(index))
