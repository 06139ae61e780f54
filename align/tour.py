"""The tour's stage of alignment: GRPO in one program, three seeds; a DPO whose optimum is known.

python -m jaxinfra tour --only align
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from align.config import RLConfig
from align.losses import PreferenceLoss
from align.step import create, make_run
from align.synthetic import optimum, train_table
from align.tasks import STOP, TASKS
from align.warm_start import make_warm_start
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from jaxinfra.tour.shell import Tour
from jaxinfra.train.config import OptimizerConfig

SEEDS = 3
TASK = TASKS["spell_backward"]
MODEL = ModelConfig(
    family="qwen3", vocab_size=TASK.vocab_size, num_layers=2, d_model=64, num_heads=4,
    num_kv_heads=2, head_dim=16, d_ff=128, qk_norm=True, tie_embeddings=True, max_seq_len=32,
)  # fmt: skip
BETA = 0.5


def stage(tour: Tour) -> None:
    """Draws the rewards of three seeds and what DPO makes of preferences with a known optimum."""
    section = tour.report.section("A model that learns by reward")
    warm, steps = (20, 3) if tour.quick else (200, 80)
    tour.console.print(f"spelling backward: {warm} steps of answers, {steps} of rewards")
    rewards = learn(warm, steps)
    start, end = rewards[:, : steps // 8 + 1].mean(1), rewards[:, -(steps // 8 + 1) :].mean(1)
    section.text(
        f"A model of two layers saw {warm} batches of short words with the same words spelt "
        f"backward, and then only rewards: {steps} steps of GRPO, each one program of rollouts, "
        f"scores, advantages and update, {SEEDS} seeds side by side. The score is reasoning-gym's."
    )
    section.table(
        "Mean reward", ("seed", "at first", "at last"),
        [(seed, f"{start[seed]:.2f}", f"{end[seed]:.2f}") for seed in range(SEEDS)],
    )  # fmt: skip
    section.figure("Reward of each step's answers", _curves(rewards))
    _preferences(tour, section)


def learn(warm: int, steps: int) -> np.ndarray:
    """Rewards [seed, step] of GRPO after `warm` steps of supervised learning."""
    problems = jax.tree.map(jnp.asarray, TASK.problems(4096, seed=0))
    adam = OptimizerConfig(learning_rate=3e-3, warmup_steps=10, final_fraction=0.1)
    start = jax.jit(make_warm_start(MODEL, adam, steps=warm, batch=64))
    params, _ = start(P.init(jax.random.key(0), MODEL), problems, jax.random.key(1))
    config = RLConfig(
        prompts=32, max_new_tokens=problems["answer"].shape[1] + 1, stop_id=STOP,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=0, final_fraction=1.0, weight_decay=0.0
        ),
    )  # fmt: skip
    states = [create(config, params, seed=seed, steps=steps) for seed in range(SEEDS)]
    run = jax.jit(jax.vmap(make_run(config, MODEL, TASK.reward, steps), in_axes=(0, None)))
    _, metrics = run(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), problems)
    return np.asarray(metrics["reward"])


def _preferences(tour: Tour, section: Any) -> None:
    rewards = jnp.asarray([1.0, 0.5, 0.0, -0.5, 0.2])
    reference = jax.nn.log_softmax(jnp.asarray([0.0, 1.0, 0.5, 0.0, -1.0]))
    steps = 50 if tour.quick else 500
    found, _ = train_table(rewards, reference, PreferenceLoss(beta=BETA), steps=steps)
    best = optimum(rewards, reference, BETA)
    distance = 0.5 * float(jnp.sum(jnp.abs(found - best)))
    tour.console.print(f"preferences: {distance:.1%} of the probability is not where it is best")
    section.text(
        f"DPO on preferences drawn from known rewards has a known best policy, ref e^(r / beta). "
        f"After {steps} steps, {distance:.2%} of the probability lies elsewhere."
    )
    section.table(
        "Five answers", ("reward", "reference", "DPO found", "the optimum"),
        [(f"{r:.1f}", *(f"{p:.3f}" for p in row)) for r, *row in zip(
            rewards.tolist(), jnp.exp(reference).tolist(), found.tolist(), best.tolist(),
            strict=True)],
    )  # fmt: skip


def _curves(rewards: np.ndarray) -> Figure:
    fig = Figure(figsize=(8, 3.5), layout="constrained")
    ax = fig.subplots()
    for seed, row in enumerate(rewards):
        ax.plot(np.arange(1, len(row) + 1), row, label=f"seed {seed}")
    ax.set_xlabel("step")
    ax.set_ylabel("mean reward")
    ax.legend()
    ax.grid(alpha=0.3)
    return fig
