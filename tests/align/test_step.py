"""A step in one program: equal to itself by many ways, and safe from nan.

That it is the host's loop, which calls its parts, is `test_host_loop`'s to show.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from align.config import RLConfig
from align.step import batch_of, create, make_run, make_step
from jaxinfra.measure import compiles
from jaxinfra.model import params as P
from tests.align.tiny import (
    CONFIGS,
    MODEL,
    PROBLEMS,
    TASK,
    difference,
    equal_bits,
    parts,
    state,
    step,
)


def host_step(name, s, reward=None):
    """The step with its parts called one after the other, the reward computed by the host."""
    config = CONFIGS[name]
    rollout, score, update = parts(name)
    problems = batch_of(PROBLEMS, config, s)
    r = rollout(s, problems)
    repeated = jax.tree.map(lambda a: np.repeat(np.asarray(a), config.group_size, axis=0), problems)
    rewards = np.asarray(TASK.reward(r, jax.tree.map(jnp.asarray, repeated)))
    experience, told = score(s, r, jnp.asarray(rewards if reward is None else reward(rewards)))
    s, metrics = update(s, experience)
    return s, told | metrics


slow = pytest.mark.slow


def operations(layers: int) -> tuple[int, int]:
    """Of GRPO's step: operations once every call is written out, and lines of its program."""

    def count(jaxpr) -> int:
        return sum(1 + sum(map(count, jaxprs_in_params(e.params))) for e in jaxpr.eqns)

    model, config = MODEL.replace(num_layers=layers), CONFIGS["grpo"]
    traced = jax.jit(make_step(config, model, TASK.reward)).trace(
        jax.eval_shape(lambda params: create(config, params), P.abstract(model)), PROBLEMS
    )
    return count(traced.jaxpr.jaxpr), traced.lower().as_text().count(" = ")


def test_a_step_grows_little_with_layers():
    """Only decoding is written out, and its layers are traced once."""
    (few, short), (many, long) = operations(2), operations(4)
    assert 0 < many - few <= 2 * 165  # 152 a layer are as few as they were when this was written
    assert 0 < long - short <= 2 * 40  # as were 33


def test_steps_share_one_program():
    """Of the first step alone something is compiled: prompts, answers and state keep their form."""
    s, _ = step("grpo")(state("grpo"), PROBLEMS)
    with compiles() as count:
        for _ in range(2):
            s, _ = step("grpo")(s, PROBLEMS)
    assert count() == 0 and int(s.step) == 3


@slow
def test_many_steps_and_seeds_in_one_program():
    """A scan of steps, mapped over seeds, gives each seed's own steps."""
    run = jax.jit(jax.vmap(make_run(CONFIGS["grpo"], MODEL, TASK.reward, 5), in_axes=(0, None)))
    states = jax.tree.map(lambda *a: jnp.stack(a), *[state("grpo", seed) for seed in (0, 7)])
    ended, metrics = run(states, PROBLEMS)
    assert metrics["reward"].shape == (2, 5)
    for i, seed in enumerate((0, 7)):
        alone = state("grpo", seed)
        for _ in range(5):
            alone, _ = step("grpo")(alone, PROBLEMS)
        assert difference(jax.tree.map(lambda a, i=i: a[i], ended.trained), alone.trained) < 1e-5
    assert difference(*(jax.tree.map(lambda a, i=i: a[i], ended.trained) for i in (0, 1))) > 1e-3


@slow
def test_one_seed_gives_the_same_bits():
    once, again = state("ppo"), state("ppo")
    for _ in range(2):
        once, first = step("ppo")(once, PROBLEMS)
        again, second = step("ppo")(again, PROBLEMS)
    assert equal_bits((once, first), (again, second))


@slow
def test_rewards_that_are_missing_do_not_move_the_policy():
    def half_missing(rewards):
        return np.where(np.arange(len(rewards)) < 8, np.nan, rewards)

    s, metrics = host_step("grpo", state("grpo"), half_missing)
    assert float(metrics["rewards/invalid"]) == 0.5
    assert np.isfinite(float(metrics["loss"])) and int(s.skipped) == 0
    before = state("grpo")
    s, metrics = host_step("grpo", before, lambda rewards: np.full_like(rewards, np.nan))
    assert float(metrics["grad_norm"]) == 0.0
    assert difference(s.trained, before.trained) == 0.0


@slow
def test_an_update_that_is_not_finite_is_left_out():
    s = state("rloo")
    broken = s.reference.replace(final_norm=s.reference.final_norm.at[0].set(jnp.nan))
    s, _ = step("rloo")(s.replace(reference=broken), PROBLEMS)
    assert int(s.skipped) == 0  # a divergence of nan is a reward that is missing
    poisoned = s.trained.policy
    poisoned = poisoned.replace(final_norm=poisoned.final_norm.at[0].set(jnp.nan))
    s = s.replace(trained=s.trained.replace(policy=poisoned))
    after, metrics = step("rloo")(s, PROBLEMS)
    assert int(after.skipped) == 1 and int(after.step) == int(s.step) + 1
    assert equal_bits(after.trained, s.trained) and float(metrics["skipped"]) == 1.0


@slow
def test_the_divergence_holds_the_policy():
    """With k3 in the loss and no reward at all, the policy goes back to its reference."""
    s = state("dr_grpo_kl")
    moved = jax.tree.map(lambda a: a * 1.1, s.trained.policy)
    s = s.replace(trained=s.trained.replace(policy=moved))
    kls = []
    for _ in range(8):
        s, metrics = host_step("dr_grpo_kl", s, np.zeros_like)
        kls.append(float(metrics["kl"]))
    assert np.mean(kls[-2:]) < 0.8 * np.mean(kls[:2])


def test_an_epoch_goes_through_all_problems():
    s, seen = state("grpo"), []
    for i in range(3):
        rows = batch_of(
            PROBLEMS | {"id": jnp.arange(12)}, CONFIGS["grpo"], s.replace(step=jnp.int32(i))
        )
        seen += rows["id"].tolist()
    assert sorted(seen) == list(range(12)) and seen != list(range(12))


@slow
def test_the_controller_is_a_part_of_the_state():
    s, metrics = step("reinforce++")(state("reinforce++"), PROBLEMS)
    assert float(s.kl.coef) != pytest.approx(0.01, rel=1e-6) and "kl_coef" in metrics


@pytest.mark.parametrize(
    ("options", "words"),
    [({"group_size": 1}, "group_size 2 or more"), ({"minibatches": 3}, "3 minibatches"),
     ({"kl_coef": 0.1}, "loss.kl_coef"),
     ({"algorithm": "rloo", "importance": "token_mask"}, "sequence_truncate"),
     ({"algorithm": "dpo"}, "choose one of")],
)  # fmt: skip
def test_configurations_without_a_meaning_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RLConfig(**options)
