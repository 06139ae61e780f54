"""Models and batches small enough for eight emulated devices, and what one device makes of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfra.model import params as P
from jaxinfra.model.config import Experts, ModelConfig, Rope
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.loss import next_token_loss
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.step import TrainState, make_step
from parallel.balance import bias_of

B, T, V = 8, 16, 64
QWEN = ModelConfig(
    family="qwen3", vocab_size=V, num_layers=4, d_model=16, num_heads=8, num_kv_heads=4, head_dim=6,
    d_ff=24, qk_norm=True, tie_embeddings=True,
)  # fmt: skip
LLAMA = QWEN.replace(family="llama", qk_norm=False, tie_embeddings=False, rope=Rope(5e5))
MOE = QWEN.replace(family="qwen3_moe", experts=Experts(8, 2, 12, True, balance_coef=0.1))
UNBALANCED = MOE.replace(experts=Experts(8, 2, 12, True, balance_coef=0.0))  # for pipelines
MODELS = {"llama": LLAMA, "moe": MOE, "qwen3": QWEN, "unbalanced": UNBALANCED}

# A larger eps than Adam's usual one: it divides by the root of the second moment, which would make
# the rounding of the smallest gradients as large as the largest.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-3, clip_norm=0.5)
RATE = schedule(OPTIMIZER, 10)


def batch(rows: int = B, *, packed: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; packed: documents of all lengths in a row, padding left and right."""
    rng = np.random.default_rng(seed)
    made = {"tokens": rng.integers(0, V, (rows, T + 1), np.int32)}
    if packed:
        ends = np.sort(rng.integers(0, T, (rows, 3)), axis=1)
        segments = 1 + (np.arange(T + 1)[None, :, None] > ends[:, None, :]).sum(axis=2)
        segments[0, :5] = 0
        segments[rows // 2, 4:] = 0
        made["segment_ids"] = segments.astype(np.int32)
    return made


def params(config: ModelConfig, seed: int = 1) -> Any:
    """Parameters whose logits differ visibly; norms are not one."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        scale = 0.1 if path[-1].name.endswith("norm") else 0.3
        draw = rng.normal(0.0, scale, shape.shape)
        return jnp.asarray(draw + path[-1].name.endswith("norm"), jnp.float32)

    return jax.tree.map_with_path(leaf, P.abstract(config))


@functools.cache
def start(config: ModelConfig) -> TrainState:
    """The state before the first step, in host memory."""
    return jax.device_get(TrainState.create(params(config), optimizer()))


@functools.cache
def optimizer() -> optax.GradientTransformation:
    """The project's AdamW, with the gradients it was given kept in front of its state."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, _, params: (grads, grads)
    )
    chain = optax.chain(keep, make_optimizer(OPTIMIZER, 10))
    return optax.GradientTransformation(chain.init, chain.update)


def gradients(state: TrainState) -> Any:
    """The gradients of the last step."""
    return getattr(state.opt_state, "inner", state.opt_state)[0]


@functools.cache
def one_device(name: str, packed: bool = True) -> dict[str, Any]:
    """Loss and gradients of the first step, parameters after three, of one device."""
    config = MODELS[name]
    step = make_step(config, optimizer(), RATE, dtype=jnp.float32)
    return run(step, start(config), packed)


def compiled(step: Any, state: TrainState, packed: bool = True) -> Any:
    """The step's program for batches of `batch`."""
    return step.lower(state, batch(packed=packed)).compile()


def run(step: Any, state: TrainState, packed: bool = True) -> dict[str, Any]:
    """Three steps on three batches: the first's loss and gradients, the parameters at the end."""
    step = compiled(step, state, packed)
    state, metrics = step(state, batch(packed=packed))
    first = jax.device_get({"loss": metrics["loss"], "gradients": gradients(state)})
    for seed in (1, 2):
        state, metrics = step(state, batch(packed=packed, seed=seed))
    last = {"params": state.params, "last": metrics["loss"], "bias": bias_of(state.opt_state)}
    return first | jax.device_get(last)


@functools.cache
def gradient_of_loss(name: str) -> Any:
    """`jax.grad` of the project's loss, without a step around it."""
    gradient = jax.grad(lambda p, b: next_token_loss(p, MODELS[name], b)[0])
    return jax.jit(gradient)(params(MODELS[name]), batch())
