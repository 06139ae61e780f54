"""A policy, problems and compiled steps small enough for a test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from align.config import ADAM, RLConfig
from align.losses import DR_GRPO, PolicyLoss
from align.step import create, make_parts, make_step
from align.tasks import STOP, TASKS
from jaxinfra.generate import Sampling
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig

TASK = TASKS["chain_sum"]
MODEL = ModelConfig(
    family="qwen3", vocab_size=TASK.vocab_size, num_layers=1, d_model=16, num_heads=2,
    num_kv_heads=1, head_dim=8, d_ff=24, qk_norm=True, tie_embeddings=True, max_seq_len=32,
)  # fmt: skip
PROBLEMS = jax.tree.map(jnp.asarray, TASK.problems(12, seed=0))
_SHARED = {"prompts": 4, "group_size": 4, "max_new_tokens": 4, "stop_id": STOP, "optimizer": ADAM}
STEPS = 6
CONFIGS = {
    "grpo": RLConfig(**_SHARED, importance="sequence_truncate"),
    "ppo": RLConfig(**_SHARED, algorithm="ppo", epochs=2, minibatches=2, kl_coef=0.05),
    "reinforce++": RLConfig(
        **_SHARED, algorithm="reinforce++", kl_coef=0.01, kl_target=0.1, importance="token_truncate"
    ),
    "rloo": RLConfig(
        **_SHARED, algorithm="rloo", kl_coef=0.05,
        sampling=Sampling(temperature=0.8, top_p=0.9, top_k=12),
    ),
    "dr_grpo_kl": RLConfig(
        **_SHARED, scale="none", loss=PolicyLoss(**vars(DR_GRPO) | {"kl_coef": 0.1}), epochs=2
    ),
}  # fmt: skip


@functools.cache
def params(seed: int = 1):
    """Random matrices large enough that distributions are far from flat."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        scale = 0.0 if path[-1].name.endswith("norm") else 0.3
        return jnp.asarray(
            rng.normal(1.0 if scale == 0.0 else 0.0, scale, shape.shape), jnp.float32
        )

    with jax.ensure_compile_time_eval():  # it may be asked for first inside a jit, and is kept
        return jax.tree.map_with_path(leaf, P.abstract(MODEL))


def state(name: str, seed: int = 0):
    return create(CONFIGS[name], params(), seed=seed, steps=STEPS)


@functools.cache
def parts(name: str):
    """The three parts, each jitted alone."""
    return tuple(jax.jit(part) for part in make_parts(CONFIGS[name], MODEL, steps=STEPS))


@functools.cache
def whole(name: str):
    """The step, not jitted."""
    return make_step(CONFIGS[name], MODEL, TASK.reward, steps=STEPS)


@functools.cache
def step(name: str):
    return jax.jit(whole(name))


def equal_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def difference(a, b) -> float:
    """The largest absolute difference of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) if x.size else 0.0 for x, y in pairs)
