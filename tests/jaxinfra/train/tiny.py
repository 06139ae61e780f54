"""Models and batches small enough to train in a test."""

import functools

import jax
import jax.numpy as jnp
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


def random_params(config: ModelConfig, seed: int = 1):
    """Parameters as at the start, but with larger matrices, so that logits differ visibly."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        if path[-1].name.endswith("norm"):
            return jnp.ones(shape.shape)
        scale = 0.08 if len(shape.shape) > 2 else 0.02
        return jnp.asarray(rng.normal(0.0, scale, shape.shape), jnp.float32)

    return jax.tree.map_with_path(leaf, P.abstract(config))


def start(config: ModelConfig, **options):
    """(a state, its step) of a run of 150 steps; equal calls share the compiled step."""
    tx, step = _programs(config, **options)
    return TrainState.create(random_params(config), tx), step


@functools.cache
def _programs(config: ModelConfig, **options):
    optimizer = OptimizerConfig(learning_rate=2e-2, warmup_steps=5, weight_decay=0.0)
    tx = make_optimizer(optimizer, 150)
    return tx, make_step(config, tx, schedule(optimizer, 150), **options)


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
