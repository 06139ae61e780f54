"""A whole model quantised: layer after layer, by one of three methods.

jaxinfra quantize smollm2-135m out --method gptq --bits 4
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from decode.quantize import awq, gptq
from decode.quantize.calibrate import Calibration, layer_of
from decode.quantize.matrices import MATRICES, each, matrix
from decode.quantize.weights import Scheme, round_to_nearest, stored_float
from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.model.quantized import dense, is_quantized

METHODS = {
    "rtn": "round to nearest, no calibration",
    "gptq": "each column's error made good by the columns after it",
    "awq": "inputs that matter scaled up before rounding, scales clipped",
}


def quantize(
    params: Params,
    config: ModelConfig,
    scheme: Scheme,
    method: str = "rtn",
    tokens: Any = None,
    *,
    head: bool = False,
    done: Callable[[int], Any] = lambda layers: None,
) -> Params:
    """`params` with the matrices of all layers as `QuantizedMatrix`, the rest as bfloat16 keeps it.

    Args:
      params: float ones; computed with in float32.
      method: one of METHODS; all but rtn need `tokens`.
      tokens: int32 [windows, T] to calibrate on.
      head: round the head as well; one that is the embedding's becomes a matrix of its own.
      done: is told the number of layers finished.

    Raises UserError for a mixture of experts, a model that is quantised already, and a group that
    does not divide.
    """
    check(params, config, scheme, method)

    def kept(path: tuple, leaf: Any) -> Any:
        leaf = jnp.asarray(leaf, jnp.float32)
        return leaf if path[-1].name in MATRICES else stored_float(leaf)

    params = jax.tree.map_with_path(kept, params)
    calibration = None
    if method != "rtn":
        if tokens is None:
            raise UserError(f"quantize: {method} needs text to calibrate on")
        calibration = Calibration(params.embed, config, tokens)
    layers = []
    for i in range(config.num_layers):
        layer = layer_of(params.layers, i)
        if calibration is None:
            new = each(layer, lambda w, _, shape: round_to_nearest(w, scheme, shape))
        else:
            inputs = calibration.inputs(layer, i)
            by = gptq.quantize_layer if method == "gptq" else awq.quantize_layer
            new = by(layer, inputs, config, scheme)
            calibration.advance(dense(new, jnp.float32), i)
        layers.append(new)
        done(i + 1)
    unembed = params.unembed
    if head:
        table = params.embed if params.unembed is None else matrix(params.unembed, 1)
        D, V = config.d_model, config.vocab_size
        unembed = round_to_nearest(jnp.asarray(table), scheme, (D, V))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    return dataclasses.replace(params, layers=stacked, unembed=unembed)


def check(params: Params, config: ModelConfig, scheme: Scheme, method: str) -> None:
    """Raises UserError for what `quantize` cannot do."""
    if method not in METHODS:
        raise UserError(f"quantize: method={method!r}; choose one of {', '.join(METHODS)}")
    if scheme.float8 and method != "rtn":
        raise UserError(f"quantize: float8 is rounded to nearest; {method} is for int8 and int4")
    if config.experts:
        raise UserError("quantize: a mixture of experts is not supported yet; give a dense model")
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise UserError("quantize: this model is quantised already; give the one it came from")
    for inputs in (config.d_model, config.num_heads * config.head_dim, config.d_ff):
        scheme.width(inputs)
