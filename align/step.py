"""A whole step of reinforcement learning as one program: answers, rewards, advantages, updates.

`make_parts` gives the three parts as pure functions, `rollout`, `score` and `update`; `make_step`
puts them into one jit, `make_run` scans that over many steps, and `align.host_loop` calls the same
parts with rewards of its own between them. Everything is a function of the state: one seed gives
the same bits. `jax.vmap` of a step trains several seeds at once.

Cost of a step: a rollout (`align.rollout`), a forward pass for each model that scores (reference,
critic, and the policy itself where there is more than one update), and three for each update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, Key, UInt

from align.config import RLConfig
from align.experience import Experience, Metrics, judge
from align.guard import guarded_update
from align.losses import KLController
from align.objective import critic_objective, logps_of, policy_objective, values_of
from align.rollout import Rollout, rollout
from align.value_model import ValueModel
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.train.optimizer import make_optimizer

Problems = Mapping[str, Any]  # "prompts" [M, P], "lengths" [M], and what the reward reads, [M, ...]
Reward = Callable[[Rollout, Problems], Array]  # float32 [B] or [B, R]; nan where it has none


@struct.dataclass
class Trained:
    """What gradients change."""

    policy: Params
    critic: ValueModel | None = None


@struct.dataclass
class RLState:
    """All that a run carries: its draws and its order of problems follow from seed and step."""

    trained: Trained
    opt_state: Any
    reference: Params | None
    kl: KLController
    seed: UInt[Array, ""]
    step: Int[Array, ""]  # steps taken
    skipped: Int[Array, ""]  # updates whose loss or gradient was not finite


class Parts(NamedTuple):
    """The three parts of a step, pure and not jitted."""

    rollout: Callable[[RLState, Problems], Rollout]
    score: Callable[[RLState, Rollout, Array], tuple[Experience, Metrics]]
    update: Callable[[RLState, Experience], tuple[RLState, Metrics]]


def create(
    config: RLConfig, params: Params, *, seed: int | Array = 0, reference: Params | None = None,
    critic: ValueModel | None = None, steps: int = 1,
) -> RLState:  # fmt: skip
    """The state before the first step. Parameters become float32.

    Args:
      reference: what divergences are from; `params` by default, where the config has a divergence.
      critic: PPO's first critic; by default the policy's trunk with a head of zeros.
      steps: of the run, for the learning rate's schedule: those of `make_parts`.
    """
    masters = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    if config.has_critic and critic is None:
        critic = ValueModel.from_policy(jax.tree.map(jnp.array, masters))
    if config.has_reference and reference is None:
        reference = jax.tree.map(jnp.array, masters)
    trained: Any = Trained(masters, critic if config.has_critic else None)
    tx = make_optimizer(config.optimizer, updates_of(config, steps))
    return RLState(
        trained, tx.init(trained), reference if config.has_reference else None,
        KLController(jnp.asarray(config.kl_coef, jnp.float32), config.kl_target),
        jnp.asarray(seed, jnp.uint32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32),
    )  # fmt: skip


def batch_of(problems: Problems, config: RLConfig, state: RLState) -> Problems:
    """The step's problems: each epoch goes through all (but a remainder) in an order of its own."""
    M = problems["prompts"].shape[0]
    epoch, place = jnp.divmod(state.step, M // config.prompts)
    order = jax.random.permutation(_key(state.seed, 0, epoch), M)
    rows = jax.lax.dynamic_slice_in_dim(order, place * config.prompts, config.prompts)
    return jax.tree.map(lambda a: a[rows], dict(problems))


def make_parts(
    config: RLConfig, model: ModelConfig, *, steps: int = 1, dtype: Any = jnp.float32
) -> Parts:
    """`rollout`, `score` and `update` of the algorithm, for a run of `steps`.

    `dtype` is that of rollouts and of every forward pass; masters stay float32.
    """
    tx = make_optimizer(config.optimizer, updates_of(config, steps))
    several = config.epochs * config.minibatches > 1

    def draw(state: RLState, problems: Problems) -> Rollout:
        policy = jax.tree.map(lambda leaf: leaf.astype(dtype), state.trained.policy)
        return rollout(
            policy, model, problems["prompts"], problems["lengths"],
            draw_key(state.seed, state.step), group_size=config.group_size,
            max_new_tokens=config.max_new_tokens, sampling=config.sampling, stop_id=config.stop_id,
        )  # fmt: skip

    def score(state: RLState, r: Rollout, rewards: Array) -> tuple[Experience, Metrics]:
        old = ref = values = None
        if several or config.importance:
            old = logps_of(config, model, state.trained.policy, r, dtype)[0]
        if state.reference is not None:
            ref = logps_of(config, model, state.reference, r, dtype)[0]
        if state.trained.critic is not None:
            values = values_of(config, model, state.trained.critic, r, dtype) * r.mask
        experience, metrics = judge(config, r, rewards, old, ref, values, state.kl.coef)
        return jax.tree.map(jax.lax.stop_gradient, experience), metrics

    def loss(trained: Trained, e: Experience) -> tuple[Array, Metrics]:
        total, metrics = policy_objective(config, model, trained.policy, e, dtype)
        if trained.critic is not None:
            error, more = critic_objective(config, model, trained.critic, e, dtype)
            total, metrics = total + error, metrics | more
        return total, metrics | {"loss": total}

    one_update = guarded_update(loss, tx)

    def update(state: RLState, e: Experience) -> tuple[RLState, Metrics]:
        carry = (state.trained, state.opt_state, state.skipped)
        kl, e = e.kl, e.replace(kl=None)  # pyright: ignore[reportAttributeAccessIssue]
        if several:

            def epoch(carry: tuple, order: Array) -> tuple[tuple, Metrics]:
                parts = jax.tree.map(
                    lambda a: a[order].reshape(config.minibatches, -1, *a.shape[1:]), e
                )
                return jax.lax.scan(one_update, carry, parts)

            carry, metrics = jax.lax.scan(epoch, carry, orders(config, state.seed, state.step))
            metrics = {name: over_updates(name)(value) for name, value in metrics.items()}
        else:
            carry, metrics = one_update(carry, e)
        controller = state.kl if kl is None else state.kl.update(kl, config.answers)
        trained, opt_state, skipped = carry
        state = RLState(
            trained, opt_state, state.reference, controller, state.seed, state.step + 1, skipped
        )
        return state, metrics | {"skipped": skipped.astype(jnp.float32)}

    return Parts(draw, score, update)


def make_step(
    config: RLConfig, model: ModelConfig, reward: Reward, *, steps: int = 1,
    dtype: Any = jnp.float32,
) -> Callable[[RLState, Problems], tuple[RLState, Metrics]]:  # fmt: skip
    """`step(state, problems) -> (state, metrics)`, for one jit: problems in, updated state out.

    Not jitted yet, so that it can be scanned and mapped: `jax.jit(step, donate_argnums=0)`.
    """
    parts = make_parts(config, model, steps=steps, dtype=dtype)

    def step(state: RLState, problems: Problems) -> tuple[RLState, Metrics]:
        problems = batch_of(problems, config, state)
        r = parts.rollout(state, problems)
        repeated = jax.tree.map(lambda a: jnp.repeat(a, config.group_size, axis=0), problems)
        experience, told = parts.score(state, r, reward(r, repeated))
        state, metrics = parts.update(state, experience)
        return state, told | metrics

    return step


def make_run(
    config: RLConfig, model: ModelConfig, reward: Reward, steps: int, *, dtype: Any = jnp.float32
) -> Callable[[RLState, Problems], tuple[RLState, Metrics]]:
    """`run(state, problems)`: `steps` steps in one program; metrics have a leading [steps]."""
    step = make_step(config, model, reward, steps=steps, dtype=dtype)

    def run(state: RLState, problems: Problems) -> tuple[RLState, Metrics]:
        return jax.lax.scan(lambda s, _: step(s, problems), state, length=steps)

    return run


def over_updates(name: str) -> Callable[[Array], Array]:
    """How a metric of several updates becomes the step's."""
    return {"max": jnp.max, "min": jnp.min}.get(name.rpartition("/")[2], jnp.mean)


def draw_key(seed: UInt[Array, ""], number: Int[Array, ""]) -> Key[Array, ""]:
    """The key of the draws of rollout `number`."""
    return _key(seed, 1, number)


def orders(
    config: RLConfig, seed: UInt[Array, ""], number: Int[Array, ""]
) -> Int[Array, "epochs B"]:
    """In which order the answers of step `number` are used in each epoch."""
    keys = jax.random.split(_key(seed, 2, number), config.epochs)
    return jax.vmap(lambda key: jax.random.permutation(key, config.answers))(keys)


def _key(seed: Array, purpose: int, number: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), number)


def updates_of(config: RLConfig, steps: int) -> int:
    """Updates of a run, for the learning rate's schedule."""
    return steps * config.epochs * config.minibatches
