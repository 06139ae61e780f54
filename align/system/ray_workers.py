"""A rollout worker in a process of Ray's, on this machine or another: one for each of a system's.

    System(loop, how, state, make_rollouts=lambda: RayRollouts(config, model))

Weights go into Ray's object store once a version; answers come back as numpy arrays. A process that
ends, or is silent for `timeout` seconds, is replaced, and the call raises: `align.system.live` then
gives the batch back and has it drawn anew. Needs `pip install 'jaxinfra[ray]'`, and this package on
every machine of the cluster.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from align.config import RLConfig
from align.host_loop import JitRollouts, Work, generate
from align.rollout import Rollout
from align.step import Problems
from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params


class _Worker:
    """What runs there."""

    def __init__(self, config: RLConfig, model: ModelConfig, dtype: str) -> None:
        self._rollouts = JitRollouts(config, model, dtype=jnp.dtype(dtype))

    def update_weights(self, params: Params, version: int) -> None:
        self._rollouts.update_weights(jax.tree.map(jnp.asarray, params), version)

    def generate(self, problems: Problems, seed: int, number: int) -> Rollout:
        return jax.device_get(generate(self._rollouts, problems, seed, number))

    def process(self) -> int:
        import os

        return os.getpid()


class RayRollouts:
    """`align.host_loop.Rollouts` by one worker; `options` are Ray's for it (num_cpus, num_gpus).

    Args:
      timeout: seconds that a batch may take, the first one's compilation included.
    """

    def __init__(
        self, config: RLConfig, model: ModelConfig, *, dtype: str = "float32",
        timeout: float = 600.0, **options: Any,
    ) -> None:  # fmt: skip
        try:
            import ray
        except ImportError:
            raise UserError("rollouts over Ray: pip install 'jaxinfra[ray]'") from None
        self._ray, self._timeout = ray, timeout
        self._make = lambda: ray.remote(**({"num_cpus": 1} | options))(_Worker).remote(
            config, model, dtype
        )
        self.worker = self._make()
        self._weights: Any = None
        self._version: int | None = None

    def update_weights(self, params: Params, version: int) -> None:
        """See `Rollouts`."""
        if version != self._version:
            self._weights, self._version = self._ray.put(jax.device_get(params)), version
            self.worker.update_weights.remote(self._weights, version)

    def begin(self, problems: Problems, seed: int, number: int) -> Work:
        """See `Rollouts`: whole answers. Raises TimeoutError, or Ray's error of a dead worker."""
        rows = {name: jax.device_get(problems[name]) for name in ("prompts", "lengths")}
        asked = self.worker.generate.remote(rows, seed, number)
        try:
            ready, _ = self._ray.wait([asked], timeout=self._timeout)
            if not ready:
                raise TimeoutError(f"a rollout worker was silent for {self._timeout:.0f} s")
            answers = jax.tree.map(jnp.asarray, self._ray.get(asked))
        except Exception:
            self._ray.kill(self.worker)
            self.worker = self._make()
            self.worker.update_weights.remote(self._weights, self._version)
            raise
        return Work(seed, number, answers, True)

    def advance(self, work: Work) -> Work:
        """See `Rollouts`: nothing is left to do."""
        return work

    def finish(self, work: Work) -> Rollout:
        """See `Rollouts`."""
        return work.carry
