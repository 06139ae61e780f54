"""The host's loop is the one program, and what fails on the way costs what it must and no more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align.array_rewards import GraphReward
from align.host_loop import HostLoop, JitRollouts
from align.rewards import FunctionReward
from tests.align import rewarders
from tests.align.tiny import (
    CONFIGS,
    MODEL,
    PROBLEMS,
    STEPS,
    TASK,
    difference,
    equal_bits,
    state,
    step,
)

slow = pytest.mark.slow


def every(function):
    return FunctionReward(lambda samples: [function(s) for s in samples], name="own")


@functools.cache
def loop(name):
    """Its programs are compiled once; tests put in their own scorers."""
    return HostLoop(CONFIGS[name], MODEL, PROBLEMS, [GraphReward(TASK.reward)], steps=STEPS)


def run(name, scorer, steps, start=None):
    loop(name).scorers, s, rows = (scorer,), start or state(name), []
    for _ in range(steps):
        s, metrics = loop(name).step(s)
        rows.append(metrics)
    return s, rows


@pytest.mark.parametrize(
    "name", ["grpo", pytest.param("ppo", marks=slow), pytest.param("reinforce++", marks=slow),
             pytest.param("rloo", marks=slow)]
)  # fmt: skip
def test_the_hosts_loop_is_the_one_program(name):
    ours, rows = run(name, GraphReward(TASK.reward), 5)
    theirs = state(name)
    for row in rows:
        theirs, metrics = step(name)(theirs, PROBLEMS)
        assert set(metrics) < set(row)
        assert row["reward"] == pytest.approx(float(metrics["reward"]), abs=1e-6)
    assert difference(ours.trained, theirs.trained) < 1e-5 and int(ours.step) == 5
    assert difference(ours.trained, state(name).trained) > 1e-3


def test_a_python_reward_gives_what_the_same_reward_in_the_graph_gives():
    ours, rows = run("grpo", every(rewarders.length), 2)
    theirs, _ = run("grpo", GraphReward(lambda r, p: jnp.sum(r.mask, axis=1) - r.stopped), 2)
    assert difference(ours.trained, theirs.trained) < 1e-5
    assert rows[1]["rewards/own/mean"] == pytest.approx(rows[1]["reward"], rel=1e-5)


def test_the_samplers_word_against_the_trainers_every_step():
    _, rows = run("grpo", every(rewarders.length), 2)
    for row in rows:
        assert 0 <= row["mismatch_kl"] < 1e-6
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["sampling/importance_sampling_ratio/min"] > 0.999

    class Stale(JitRollouts):  # draws with other weights than it was given
        def update_weights(self, params, version):
            super().update_weights(jax.tree.map(lambda a: a * 1.3, params), version)

    found = loop("grpo")
    honest, found.rollouts = found.rollouts, Stale(CONFIGS["grpo"], MODEL)
    try:
        _, rows = run("grpo", every(rewarders.length), 1)
    finally:
        found.rollouts = honest
    assert rows[0]["mismatch_kl"] > 1e-4
    assert rows[0]["sampling/sampling_logp_difference/max"] > 0.1


def test_weights_are_handed_over_without_a_copy_and_resharded_between_meshes():
    s, rollouts = state("grpo"), JitRollouts(CONFIGS["grpo"], MODEL)
    rollouts.update_weights(s.trained.policy, 0)
    address = lambda tree: [a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)]  # noqa: E731
    assert address(rollouts.params) == address(s.trained.policy)
    other = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    moved = JitRollouts(CONFIGS["grpo"], MODEL, places=other)
    moved.update_weights(s.trained.policy, 0)
    assert {a.device for a in jax.tree.leaves(moved.params)} == {jax.devices()[5]}
    assert equal_bits(moved.params, s.trained.policy)


def test_rewards_that_fail_are_masked_and_the_run_goes_on():
    """Half of the answers cannot be scored: what they say does not move the policy."""

    def half(samples):
        return [None if i % 2 else float(len(s.answer)) for i, s in enumerate(samples)]

    s, rows = run("grpo", FunctionReward(half), 2)
    assert [row["rewards/invalid"] for row in rows] == [0.5, 0.5]
    assert all(np.isfinite(row["loss"]) for row in rows) and int(s.skipped) == 0
    theirs, _ = run(
        "grpo",
        GraphReward(lambda r, p: jnp.where(jnp.arange(16) % 2, jnp.nan, r.mask.sum(1) - r.stopped)),
        2,
    )
    assert difference(s.trained, theirs.trained) < 1e-5


def test_a_step_without_rewards_is_asked_for_again_and_then_passed_over():
    calls = []

    def failing(samples):
        calls.append(1)
        if len(calls) in (2, 4, 5):  # the second step's first attempt; both of the third's
            raise RuntimeError("no")
        return [float(len(s.answer)) for s in samples]

    s, rows = run("grpo", FunctionReward(failing), 4)
    assert [row["passed_over"] for row in rows] == [0.0, 0.0, 1.0, 0.0]
    assert rows[2]["rewards/failing/raised"] == 16 and len(calls) == 6
    before, _ = run("grpo", every(rewarders.length), 2)
    after, _ = run("grpo", FunctionReward(lambda samples: 1 / 0, name="bad"), 1, before)
    assert equal_bits(after.trained, before.trained) and int(after.step) == 3  # Adam stands still
    assert equal_bits(after.opt_state, before.opt_state)
    assert int(s.step) == 4


@slow
def test_gradients_that_are_not_finite_are_left_out_and_the_run_goes_on():
    first, _ = run("dr_grpo_kl", every(rewarders.length), 1)
    reference = first.reference
    broken = reference.replace(final_norm=reference.final_norm.at[0].set(jnp.nan))
    second, rows = run("dr_grpo_kl", every(rewarders.length), 1, first.replace(reference=broken))
    assert rows[0]["skipped"] == 2.0  # both epochs of it
    assert equal_bits(second.trained, first.trained) and int(second.step) == 2
    third, rows = run("dr_grpo_kl", every(rewarders.length), 1, second.replace(reference=reference))
    assert rows[0]["skipped"] == 2.0 and difference(third.trained, first.trained) > 1e-4


def test_as_many_weights_as_scorers():
    with pytest.raises(ValueError, match="2 scorers and 1 reward_weights"):
        HostLoop(CONFIGS["grpo"], MODEL, PROBLEMS, [every(len), every(len)], steps=1)
