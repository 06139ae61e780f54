"""PPO on meshes of emulated devices, shared or disjoint, is PPO on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align.array_rewards import GraphReward, ModelReward
from align.host_loop import HostLoop, JitRollouts
from align.step import create
from align.system.placement import PlacedLoop, Placement
from align.value_model import ValueModel
from jaxinfra.model import params as P
from parallel import mesh
from parallel.layout import Layout
from tests.align.test_rewards import batch
from tests.align.tiny import CONFIGS, MODEL, PROBLEMS, TASK, difference

WIDE = dataclasses.replace(MODEL, vocab_size=16, num_kv_heads=2)  # divides over tp
CONFIG = CONFIGS["ppo"]
STEPS = 2


@functools.cache
def params():
    rng = np.random.default_rng(3)

    def leaf(path, shape):
        mean, scale = (1.0, 0.0) if path[-1].name.endswith("norm") else (0.0, 0.3)
        return jnp.asarray(rng.normal(mean, scale, shape.shape), jnp.float32)

    return jax.tree.map_with_path(leaf, P.abstract(WIDE))


def state():
    return create(CONFIG, params(), steps=STEPS)


def layout(sizes, devices):
    return Layout(WIDE, mesh.make(mesh.parse(sizes), devices))


@functools.cache
def one_device():
    loop = HostLoop(CONFIG, WIDE, PROBLEMS, [GraphReward(TASK.reward)], steps=STEPS)
    s, rows = state(), []
    for _ in range(STEPS):
        s, metrics = loop.step(s)
        rows.append(metrics)
    return s, rows


def placements():
    eight = jax.devices()
    return {
        "one mesh": Placement(layout("dp=2,fsdp=2,tp=2", eight)),
        "disjoint": Placement(
            layout("dp=2,tp=2", eight[:4]), layout("fsdp=2", eight[4:6]), layout("tp=2", eight[6:])
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one mesh", "disjoint"])
def test_ppo_on_meshes_is_ppo_on_one_device(name):
    placement = placements()[name]
    apart = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    rollouts = JitRollouts(CONFIG, WIDE, places=apart if name == "disjoint" else None)
    loop = PlacedLoop(
        CONFIG, WIDE, PROBLEMS, [GraphReward(TASK.reward)], placement, steps=STEPS,
        rollouts=rollouts,
    )  # fmt: skip
    theirs, expected = one_device()
    ours = loop.place(state())
    for row in expected:
        ours, metrics = loop.step(ours)
        for key in ("reward", "loss", "kl", "grad_norm", "loss/value", "entropy", "mismatch_kl"):
            assert metrics[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), key
    ours = jax.device_get(ours)
    assert difference(ours.trained, jax.device_get(theirs.trained)) < 1e-5
    assert difference(ours.trained, jax.device_get(state().trained)) > 1e-3
    assert int(ours.step) == STEPS and int(ours.skipped) == 0


def test_models_lie_where_they_are_placed():
    placement = placements()["disjoint"]
    loop = PlacedLoop(CONFIG, WIDE, PROBLEMS, [GraphReward(TASK.reward)], placement, steps=STEPS)
    placed = loop.place(state())
    devices = lambda tree: {d.id for a in jax.tree.leaves(tree) for d in a.devices()}  # noqa: E731
    ids = [d.id for d in jax.devices()]
    assert devices(placed.trained.policy) == set(ids[:4])
    assert devices(placed.trained.critic) == set(ids[4:6]) == devices(placed.opt_state[1])
    assert devices(placed.reference) == set(ids[6:])


def test_a_reward_model_on_a_mesh_scores_as_on_one_device():
    model = ValueModel(params(), jnp.ones(WIDE.d_model), jnp.float32(0.5))
    cut = layout("fsdp=2,tp=2", jax.devices()[4:]).mesh
    answers = batch()
    alone, meshed = ModelReward(model, WIDE), ModelReward(model, WIDE, mesh=cut)
    np.testing.assert_allclose(meshed(answers), alone(answers), atol=1e-5)
