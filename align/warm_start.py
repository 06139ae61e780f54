"""Supervised learning of a task's own answers: where a policy begins that has to learn by reward.

A policy whose answers are never right has no gradient; some hundred steps on problems with their
answers give it the form, and reward does the rest. All steps are one scan, for one jit.

Cost: a forward and a backward pass of `batch` prompts with answers a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from align.guard import guarded_update
from align.logprobs import answer_logps
from align.losses.sft import nll_loss
from align.rollout import joined
from align.step import Problems
from align.tasks import PAD, STOP
from jaxinfra.generate import Sampling
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.optimizer import make_optimizer


def make_warm_start(
    model: ModelConfig, optimizer: OptimizerConfig, *, steps: int, batch: int
) -> Callable[[Params, Problems, Key[Array, ""]], tuple[Params, Float[Array, " steps"]]]:
    """`run(params, problems, key) -> (params, losses)`: nats a token of the answer, each step.

    `problems` hold "prompts", "lengths", "answer" and "answer_length" (`align.tasks`); each step
    draws `batch` of them. The stop token after the answer is learnt as well.
    """
    tx = make_optimizer(optimizer, steps)

    def loss(params: Params, rows: Problems) -> tuple[Array, dict]:
        answer, length = jnp.pad(rows["answer"], ((0, 0), (0, 1))), rows["answer_length"]
        T = answer.shape[1]
        answer = jnp.where(jnp.arange(T) == length[:, None], STOP, answer)
        mask = (jnp.arange(T) <= length[:, None]).astype(jnp.float32)
        tokens = joined(rows["prompts"], rows["lengths"], answer, mask, PAD)
        logps, _ = answer_logps(params, model, tokens, rows["lengths"], T, Sampling(1.0))
        total = nll_loss(logps, mask)
        return total, {"loss": total}

    update = guarded_update(loss, tx)

    def run(params: Params, problems: Problems, key: Key[Array, ""]) -> tuple[Params, Array]:
        def step(carry: Any, key: Key[Array, ""]) -> tuple[Any, Array]:
            rows = jax.random.randint(key, (batch,), 0, problems["prompts"].shape[0])
            carry, metrics = update(carry, jax.tree.map(lambda a: a[rows], dict(problems)))
            return carry, metrics["loss"]

        trained: Any = params
        start = (trained, tx.init(trained), jnp.zeros((), jnp.int32))
        (params, _, _), losses = jax.lax.scan(step, start, jax.random.split(key, steps))
        return params, losses

    return run
