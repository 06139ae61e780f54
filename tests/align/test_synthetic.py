"""Supervised learning of answers, and preferences whose optimum is known and reached."""

import jax
import jax.numpy as jnp
import pytest

from align.losses import PreferenceLoss
from align.synthetic import optimum, train_table
from align.warm_start import make_warm_start
from jaxinfra.train.config import OptimizerConfig
from tests.align.tiny import MODEL, PROBLEMS, params

REWARDS = jnp.asarray([1.0, 0.5, 0.0, -0.5, 0.2])
REFERENCE = jax.nn.log_softmax(jnp.asarray([0.0, 1.0, 0.5, 0.0, -1.0]))


def distance(config, beta) -> float:
    """The share of probability that lies elsewhere than in the optimum of `beta`."""
    found, losses = train_table(REWARDS, REFERENCE, config, steps=500)
    assert float(losses[-1]) < float(losses[0])
    return 0.5 * float(jnp.sum(jnp.abs(found - optimum(REWARDS, REFERENCE, beta))))


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_dpo_reaches_the_known_optimum(beta):
    assert distance(PreferenceLoss(beta=beta), beta) < 0.02


def test_another_loss_or_another_beta_does_not():
    assert distance(PreferenceLoss(beta=0.5), 1.0) > 0.1
    assert distance(PreferenceLoss(kind="hinge", beta=0.5), 0.5) > 0.05
    assert distance(PreferenceLoss(beta=0.5, label_smoothing=0.2), 0.5) > 0.05


def test_a_warm_start_learns_answers_and_where_they_stop():
    adam = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    run = jax.jit(make_warm_start(MODEL, adam, steps=60, batch=12))
    trained, losses = run(params(), PROBLEMS, jax.random.key(0))
    assert float(losses[-5:].mean()) < 0.6 * float(losses[:5].mean())
    assert jax.tree.structure(trained) == jax.tree.structure(params())
