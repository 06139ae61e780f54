"""Matrices, a model that has learnt something, and NumPy's word on what rounding gives."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from decode.quantize import Scheme, windows
from jaxinfra.loading import Model
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import MLP, Params, init
from jaxinfra.model.quantized import QuantizedMatrix
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.step import TrainState, make_step

CONFIG = ModelConfig(
    family="llama", vocab_size=320, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2,
    head_dim=16, d_ff=128, max_seq_len=256, tie_embeddings=True,
)  # fmt: skip
TEXT = dict(count=24, length=96, held_out=12)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(w: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The float32 matrix [o, i] that rounding `w` leaves, by the definition."""
    o, i = w.shape
    groups = w.reshape(o, -1, scheme.group or i)
    most = np.float32({8: 127.5, 4: 7.5}[scheme.bits] if not scheme.float8 else 448)
    scales = (np.abs(groups).max(axis=-1, keepdims=True) * np.float32(1 / most)).astype(
        ml_dtypes.bfloat16
    )
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    if scheme.float8:
        steps = np.clip(groups / scales, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    else:
        half = 1 << scheme.bits - 1
        steps = np.clip(np.rint(groups / scales), -half, half - 1)
    return (steps.astype(np.float32) * scales).reshape(o, i)


def meant(w: QuantizedMatrix) -> np.ndarray:
    """The matrix that values and scales stand for, read by NumPy from their bytes."""
    values, scales = np.asarray(w.values), np.asarray(w.scales)
    if values.dtype == np.uint8:
        low, high = (values & 15).astype(np.int32) - 8, (values >> 4).astype(np.int32) - 8
        values = np.stack([low, high], axis=-1).reshape(*values.shape[:-1], -1)
    floats = values.astype(np.float32) * scales[..., None]
    return floats.swapaxes(0, 1).reshape(scales.shape[1], math.prod(values.shape[::2]))


def salient(params: Params, factor: float = 16.0) -> Params:
    """The same function, with eight inputs of q, k, v and gate, up times `factor`."""
    s = jnp.ones(CONFIG.d_model).at[3::8].set(factor)
    layers = params.layers
    attn, mlp = layers.attn, layers.mlp
    assert isinstance(mlp, MLP)
    attn = dataclasses.replace(
        attn, **{name: getattr(attn, name) / s[:, None, None] for name in ("q", "k", "v")}
    )
    mlp = MLP(mlp.gate / s[:, None], mlp.up / s[:, None], mlp.down)
    layers = dataclasses.replace(
        layers, attn=attn, mlp=mlp, attn_norm=layers.attn_norm * s, mlp_norm=layers.mlp_norm * s
    )
    return dataclasses.replace(params, layers=layers)


def texts(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of Python's library, and of other files of it."""
    return windows("stdlib", Tokenizer.byte_level(), **(TEXT | {"count": count}))


@functools.cache
def trained() -> tuple[Model, np.ndarray, np.ndarray]:
    """A byte model after 100 steps on Python's library, text to calibrate on, other text.

    Eight of its inputs are then made 16 times as large and their weights as small, which changes
    nothing that it computes and is how large models are: few inputs matter more than the others.
    """
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=10)
    tx = make_optimizer(optimizer, 100)
    step = make_step(CONFIG, tx, schedule(optimizer, 100), dtype=jnp.float32)
    text, held_out = texts(200)
    state = TrainState.create(init(jax.random.key(0), CONFIG), tx)
    order = np.random.default_rng(0)
    for _ in range(100):
        state, metrics = step(state, {"tokens": text[order.integers(0, len(text), 8)]})
    assert float(metrics["nll"]) < 3.5  # 5.8 before
    model = Model(CONFIG, salient(state.params), Tokenizer.byte_level())
    return model, text[: TEXT["count"]], held_out


@functools.cache
def untrained() -> tuple[Model, np.ndarray]:
    """A model that has learnt nothing, which takes no time, and text."""
    params = init(jax.random.key(0), CONFIG)
    return Model(CONFIG, salient(params), Tokenizer.byte_level()), texts(TEXT["count"])[0]
