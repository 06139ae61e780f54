"""Models and batches small enough to train in a test."""

import functools

import jax
import numpy as np

from jaxinfra.model import params as P
from jaxinfra.model.config import Experts, ModelConfig
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.optimizer import make_optimizer, schedule
from jaxinfra.train.step import TrainState, make_step

V = 61
DENSE = ModelConfig(
    family="qwen3", vocab_size=V, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=6,
    d_ff=24, qk_norm=True, tie_embeddings=True,
)  # fmt: skip
BIASED = DENSE.replace(family="qwen2", qkv_bias=True, qk_norm=False, tie_embeddings=False)
SPARSE = DENSE.replace(family="qwen3_moe", experts=Experts(4, 2, 8, True, balance_coef=0.1))
CAPPED = DENSE.replace(logit_soft_cap=3.0)


def tokens(B: int, T: int, seed: int = 0) -> np.ndarray:
    """Random int32 [B, T + 1]."""
    return np.random.default_rng(seed).integers(0, V, (B, T + 1), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def random_params(config: ModelConfig):
    """Initial parameters with larger matrices, so that logits differ visibly."""
    params = P.init(jax.random.key(1), config)
    return jax.tree.map(lambda leaf: leaf * 4.0 if leaf.ndim > 2 else leaf, params)


def start(config: ModelConfig, optimizer: OptimizerConfig | None = None, steps=50, **options):
    """(a state, its step) of a short run."""
    optimizer = optimizer or OptimizerConfig(warmup_steps=2)
    create, step = _programs(config, optimizer, steps, **options)
    return create(random_params(config)), step


@functools.cache
def _programs(config: ModelConfig, optimizer: OptimizerConfig, steps: int, **options):
    tx = make_optimizer(optimizer, steps)
    create = jax.jit(lambda params: TrainState.create(params, tx))
    return create, make_step(config, tx, schedule(optimizer, steps), **options)


def differences(a, b) -> float:
    """The largest difference between two trees, by the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
        / max(float(np.abs(np.asarray(y, np.float64)).max()), 1e-30)
        for x, y in pairs
    )


def equal_bits(a, b) -> bool:
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
