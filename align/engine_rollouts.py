"""Rollouts by decode's engine: continuous batching, pages, and a prompt read once for its group.

Where answers differ in length, no row waits for the longest one: a place in the batch is another
answer's as soon as its own has ended. Log-probabilities are the engine's, of the distribution that
it drew from; the trainer's differ from them by rounding, which the metric mismatch_kl tells.

Weights come merged as the engine wants them (`jaxinfra.model.cache.unstack`): one copy of the
layers' matrices on the device a step, none of the embedding. They may come between two steps of the
engine; answers under way go on with the keys and values that they have.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align.config import RLConfig
from align.host_loop import Work
from align.rollout import Rollout
from align.step import Problems
from decode.config import EngineConfig
from decode.engine import Engine
from decode.request import Output, QueueFull, Request, SamplingParams
from decode.runner import Runner
from jaxinfra.model.cache import unstack
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params


@dataclasses.dataclass
class _Batch:
    """Answers under way: [row] of what has come so far."""

    problems: Problems
    waiting: deque[Request]
    tokens: list[list[int]]
    logps: list[list[float]]
    ended: list[str | None]


class EngineRollouts:
    """One engine that draws batch after batch; not for two threads at once.

    Args:
      params: the first weights, which give shapes.
      engine: its sizes.
      stride: steps of the engine a call of `advance`; between two calls the weights may change.
    """

    def __init__(
        self, config: RLConfig, model: ModelConfig, params: Params, *, engine: EngineConfig,
        dtype: Any = jnp.float32, stride: int = 8,
    ) -> None:  # fmt: skip
        self._config, self._stride = config, stride
        self._merged = jax.jit(
            lambda params: unstack(jax.tree.map(lambda leaf: leaf.astype(dtype), params), model)
        )
        self.engine = Engine(Runner(self._merged(params), model, engine), None, engine)

    def update_weights(self, params: Params, version: int) -> None:
        """See `align.host_loop.Rollouts`."""
        self.engine.update_weights(self._merged(params))

    def begin(self, problems: Problems, seed: int, number: int) -> Work:
        """See `align.host_loop.Rollouts`."""
        config, s = self._config, self._config.sampling
        prompts, lengths = jax.device_get((problems["prompts"], problems["lengths"]))
        seeds = np.random.SeedSequence([seed, number]).generate_state(len(prompts))
        requests = deque(
            Request(
                f"{number}/{i}",
                tuple(prompt[:n].tolist()),
                SamplingParams(
                    max_tokens=config.max_new_tokens, temperature=s.temperature,
                    top_k=s.top_k or 0, top_p=s.top_p, stop_token_ids=(config.stop_id,),
                    ignore_eos=True, n=config.group_size, logprobs=0, seed=int(seeds[i]),
                ),
            )
            for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
        )  # fmt: skip
        B = config.answers
        carry = _Batch(
            problems, requests, [[] for _ in range(B)], [[] for _ in range(B)], [None] * B
        )
        return Work(seed, number, carry, False)

    def advance(self, work: Work) -> Work:
        """See `align.host_loop.Rollouts`."""
        batch: _Batch = work.carry
        for _ in range(self._stride):
            self._admit(batch)
            for output in self.engine.step():
                self._take(batch, output)
            if all(batch.ended):
                return dataclasses.replace(work, done=True)
        return work

    def _admit(self, batch: _Batch) -> None:
        while batch.waiting:
            try:
                self.engine.add(batch.waiting[0])
            except QueueFull:
                if not self.engine.has_work():
                    raise  # it would never have room
                return
            batch.waiting.popleft()

    def _take(self, batch: _Batch, output: Output) -> None:
        row = int(output.request_id.partition("/")[2]) * self._config.group_size + output.index
        batch.tokens[row] += output.token_ids
        logps = output.logprobs or ()
        batch.logps[row] += [
            found[token] for token, found in zip(output.token_ids, logps, strict=True)
        ]
        batch.ended[row] = output.finish_reason

    def finish(self, work: Work) -> Rollout:
        """See `align.host_loop.Rollouts`. An answer that the engine broke off has no token."""
        config, batch = self._config, work.carry
        G, T = config.group_size, config.max_new_tokens
        prompts, lengths = jax.device_get((batch.problems["prompts"], batch.problems["lengths"]))
        prompts, lengths = np.repeat(prompts, G, axis=0), np.repeat(lengths, G)
        B, P = prompts.shape
        tokens = np.zeros((B, P + T), np.int32)
        answer, logps, mask = (np.zeros((B, T), t) for t in (np.int32, np.float32, np.float32))
        stopped = np.zeros(B, np.float32)
        for row in range(B):
            n = lengths[row]
            tokens[row, :n] = prompts[row, :n]
            if batch.ended[row] not in ("stop", "length"):
                continue
            m = len(batch.tokens[row])
            answer[row, :m], logps[row, :m], mask[row, :m] = (
                batch.tokens[row], batch.logps[row], 1.0
            )  # fmt: skip
            tokens[row, n : n + m] = batch.tokens[row]
            stopped[row] = batch.tokens[row][-1] == config.stop_id
        return Rollout(*map(jnp.asarray, (tokens, lengths, answer, mask, logps, stopped)))
