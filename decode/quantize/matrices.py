"""The matrices of a layer that are quantised, and which inputs each has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from jaxinfra.model.params import MLP, Attention, Layer
from jaxinfra.model.quantized import QuantizedMatrix

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")

Quantize = Callable[[Array, str, tuple], QuantizedMatrix]


def matrix(leaf: Array, inputs: int) -> Array:
    """A weight whose first `inputs` axes are its inputs, as a matrix [o, i]."""
    return jnp.asarray(leaf).reshape(math.prod(leaf.shape[:inputs]), -1).T


def each(layer: Layer, quantize: Quantize) -> Layer:
    """The layer with `quantize` of all its matrices.

    It is given the matrix [o, i], the name of its inputs in `LayerInputs` and the array's shape.
    """
    attn, mlp = layer.attn, layer.mlp
    assert isinstance(attn, Attention) and isinstance(mlp, MLP)

    def one(leaf: Array, name: str, inputs: int = 1) -> QuantizedMatrix:
        return quantize(matrix(leaf, inputs), name, tuple(leaf.shape))

    return dataclasses.replace(
        layer,
        attn=dataclasses.replace(
            attn,
            q=one(attn.q, "qkv"),
            k=one(attn.k, "qkv"),
            v=one(attn.v, "qkv"),
            o=one(attn.o, "o", 2),
        ),
        mlp=dataclasses.replace(
            mlp,
            gate=one(mlp.gate, "gate_up"),
            up=one(mlp.up, "gate_up"),
            down=one(mlp.down, "down"),
        ),
    )
