"""A step whose rewards come from Python: the update of `align.step`, with the host in its midst.

    loop = HostLoop(config, model, problems, [FunctionReward(score)], steps=100)
    for _ in range(100):
        state, metrics = loop.step(state)

Rollouts come from whatever fits `Rollouts`; with the same seeds and the same rewards a step here is
a step of `make_step`. What can fail on the way costs no more than it must: answers without a reward
are masked, a step without any is passed over, an update that is not finite is left out.

Cost beside the one program: the rollout's arrays come to the host ([B, S] and four of [B, T]), and
three programs are launched in place of one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from align.config import RLConfig
from align.experience import Experience
from align.rewards import Answers, Scorer, score
from align.rollout import Generation, Rollout, advance, begin, finish, rollout
from align.step import Problems, RLState, batch_of, draw_key, make_parts
from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params


@dataclasses.dataclass(frozen=True)
class Work:
    """Answers under way, in whatever form those who draw them keep it."""

    seed: int
    number: int
    carry: Any
    done: bool


class Rollouts(Protocol):
    """Draws answers with the weights that it was given last; not for two threads at once."""

    def update_weights(self, params: Params, version: int) -> None:
        """From now on tokens are of `params`, those of the trainer after `version` steps."""
        ...

    def begin(self, problems: Problems, seed: int, number: int) -> Work:
        """Begins `group_size` answers to each problem; draws follow from seed and number."""
        ...

    def advance(self, work: Work) -> Work:
        """Goes on for a while: between two calls the weights may be others."""
        ...

    def finish(self, work: Work) -> Rollout:
        """The answers of work that is done."""
        ...


def generate(rollouts: Rollouts, problems: Problems, seed: int, number: int) -> Rollout:
    """Answers from begin to end with the same weights."""
    work = rollouts.begin(problems, seed, number)
    while not work.done:
        work = rollouts.advance(work)
    return rollouts.finish(work)


class JitRollouts:
    """`align.rollout` in one program, on the device or mesh of the weights or on another.

    Weights are taken without a copy where they are; with `places`, a tree of shardings, they are
    brought there (a reshard between meshes).

    Args:
      chunk: tokens a call of `advance`; by default `begin` draws whole answers.
    """

    def __init__(
        self, config: RLConfig, model: ModelConfig, *, chunk: int | None = None,
        dtype: Any = jnp.float32, places: Any = None,
    ) -> None:  # fmt: skip
        self.params: Params | None = None
        self.version, self.chunk, self._places = -1, chunk, places
        how: Any = {"sampling": config.sampling, "stop_id": config.stop_id}
        size: Any = {"group_size": config.group_size, "max_new_tokens": config.max_new_tokens}

        def cast(params: Params) -> Params:
            return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

        def start(params: Params, rows: Problems, seed: Array, number: Array) -> Any:
            first = rollout if chunk is None else begin
            key = draw_key(seed, number)
            return first(cast(params), model, rows["prompts"], rows["lengths"], key, **size, **how)

        def on(params: Params, carry: Generation, seed: Array, number: Array) -> Generation:
            key = draw_key(seed, number)
            return advance(cast(params), model, carry, key, carry.t + (chunk or 0), **how)

        self._start, self._on, self._end = jax.jit(start), jax.jit(on), jax.jit(finish)

    def update_weights(self, params: Params, version: int) -> None:
        """See `Rollouts`."""
        self.params = params if self._places is None else jax.device_put(params, self._places)
        self.version = version

    def begin(self, problems: Problems, seed: int, number: int) -> Work:
        """See `Rollouts`."""
        if self.params is None:
            raise UserError("rollouts: no weights yet; call update_weights first")
        return self.work(seed, number, self._start(*self._arguments(problems, seed, number)))

    def like(self, problems: Problems, seed: int, number: int) -> Any:
        """Shapes of the carry of such work."""
        return jax.eval_shape(self._start, *self._arguments(problems, seed, number))

    def _arguments(self, problems: Problems, seed: int, number: int) -> tuple:
        rows = {name: problems[name] for name in ("prompts", "lengths")}
        return self.params, rows, jnp.uint32(seed), jnp.int32(number)

    def advance(self, work: Work) -> Work:
        """See `Rollouts`."""
        assert self.params is not None
        seed, number = jnp.uint32(work.seed), jnp.int32(work.number)
        carry = self._on(self.params, work.carry, seed, number)
        return self.work(work.seed, work.number, carry)

    def work(self, seed: int, number: int, carry: Any) -> Work:
        """What stands at `carry`, a Rollout or a Generation."""
        if isinstance(carry, Rollout):
            return Work(seed, number, carry, True)
        done = int(carry.t) >= carry.answer.shape[1] or bool(np.all(carry.done))
        return Work(seed, number, carry, done)

    def finish(self, work: Work) -> Rollout:
        """See `Rollouts`."""
        return work.carry if isinstance(work.carry, Rollout) else self._end(work.carry)


class HostLoop:
    """Steps of a run over `problems`, scored by `scorers`, one column of rewards each.

    Args:
      steps: of the run, for the learning rate's schedule.
      rollouts: where answers come from; by default one program beside the others.
      attempts: how often a step's rewards are asked for, where not one answer got any.
    """

    def __init__(
        self, config: RLConfig, model: ModelConfig, problems: Problems, scorers: Sequence[Scorer],
        *, steps: int, rollouts: Rollouts | None = None, attempts: int = 2,
        dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        if len(scorers) != len(config.reward_weights):
            raise UserError(
                f"align: {len(scorers)} scorers and {len(config.reward_weights)} reward_weights: "
                "give one weight each"
            )
        self.config, self.problems, self.scorers = config, dict(problems), tuple(scorers)
        self.attempts = attempts
        self.rollouts = rollouts or JitRollouts(config, model, dtype=dtype)
        parts = make_parts(config, model, steps=steps, dtype=dtype)
        self._batch = jax.jit(lambda problems, state: batch_of(problems, config, state))
        self._score, self._update = jax.jit(parts.score), jax.jit(parts.update)

    def step(self, state: RLState) -> tuple[RLState, dict[str, float]]:
        """One step. Metrics have TRL's names; times are in seconds.

        Where no answer has a reward after all attempts, the state's step alone is one more
        (metric passed_over = 1).
        """
        state, metrics, _ = self.watched_step(state)
        return state, metrics

    def watched_step(self, state: RLState) -> tuple[RLState, dict[str, float], Experience | None]:
        """`step`, and what it learnt from."""
        clock = [time.perf_counter()]
        number = int(state.step)
        self.rollouts.update_weights(state.trained.policy, number)
        problems = self.batch(state)
        r = generate(self.rollouts, problems, int(state.seed), number)
        answers = answers_of(r, problems, self.config.group_size)
        clock.append(time.perf_counter())
        rewards, told = self.rewards_of(answers)
        clock.append(time.perf_counter())
        state, metrics, experience = self.learn(state, r, rewards)
        clock.append(time.perf_counter())
        gen, reward, update = map(float, np.diff(clock))
        times = {"step_time": clock[-1] - clock[0], "timing_s/gen": gen,
                 "timing_s/reward": reward, "timing_s/update": update}  # fmt: skip
        return state, metrics | told | times, experience

    def batch(self, state: RLState) -> Problems:
        """The problems of the state's step."""
        return self._batch(self.problems, state)

    def learn(
        self, state: RLState, r: Rollout, rewards: np.ndarray, weights: np.ndarray | None = None
    ) -> tuple[RLState, dict[str, float], Experience | None]:
        """The update from answers and their rewards [B, R], each answer counting `weights` [B].

        Where no answer has a reward, the state's step alone is one more (passed_over = 1).
        """
        if np.all(np.isnan(rewards)):
            state = state.replace(step=state.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
            return state, {"passed_over": 1.0, "rewards/invalid": 1.0}, None
        experience, judged = self._score(state, r, jnp.asarray(rewards))
        if weights is not None:
            each = jnp.broadcast_to(jnp.asarray(weights)[:, None], experience.mask.shape)
            if experience.weights is not None:
                each = each * experience.weights
            experience = experience.replace(weights=each)
        state, updated = self._update(state, experience)
        metrics = {k: float(v) for k, v in jax.device_get(judged | updated).items()}
        return state, metrics | {"passed_over": 0.0}, experience

    def rewards_of(self, answers: Answers) -> tuple[np.ndarray, dict[str, float]]:
        """float32 [B, R], and metrics; asked for again where there is not one."""
        rewards, told = score(self.scorers, answers)
        for _ in range(self.attempts - 1):
            if not np.all(np.isnan(rewards)):
                break
            rewards, told = score(self.scorers, answers)
        return rewards, told


def answers_of(r: Rollout, problems: Problems, group_size: int) -> Answers:
    """Answers on the host, each with its problem's row."""
    r, rows = jax.device_get((r, dict(problems)))
    return Answers(r, {k: np.repeat(v, group_size, axis=0) for k, v in rows.items()})
