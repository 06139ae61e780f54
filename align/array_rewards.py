"""Rewards that are array programs: a task's own score, and reward models, on any mesh."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from align.rewards import Answers
from align.step import Reward
from align.value_model import ValueModel, sequence_scores
from jaxinfra.model.config import ModelConfig
from parallel.layout import Layout, shardings


class GraphReward:
    """A function of (rollout, problems) that jit can take, such as a task's `reward`."""

    def __init__(self, reward: Reward, *, name: str = "reward", timeout: float = 600.0) -> None:
        self.name, self.timeout, self.counts = name, timeout, Counter()
        self._reward = jax.jit(reward)

    def __call__(self, answers: Answers) -> np.ndarray:
        return np.asarray(self._reward(answers.rollout, dict(answers.problems)))


class ModelReward:
    """A trained reward model: its number at each answer's last token.

    With a mesh its arrays are cut as `parallel.layout` says, which may be another mesh than the
    policy's.
    """

    def __init__(
        self, model: ValueModel, config: ModelConfig, *, mesh: Mesh | None = None,
        name: str = "reward_model", timeout: float = 600.0,
    ) -> None:  # fmt: skip
        self.name, self.timeout, self.counts = name, timeout, Counter()
        if mesh is not None:
            specs = ValueModel(Layout(config, mesh).specs, *[jax.sharding.PartitionSpec()] * 2)
            model = jax.device_put(model, shardings(mesh, specs))
        self._model = model
        self._scores = jax.jit(
            lambda model, tokens, lengths: sequence_scores(model, config, tokens, lengths)
        )

    def __call__(self, answers: Answers) -> np.ndarray:
        r = answers.rollout
        lengths = (r.lengths + np.sum(r.mask, axis=1)).astype(np.int32)
        return np.asarray(self._scores(self._model, jnp.asarray(r.tokens), jnp.asarray(lengths)))
