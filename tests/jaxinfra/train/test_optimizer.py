"""The optimisers: what each leaf gets, and the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfra.errors import UserError
from jaxinfra.train.config import OptimizerConfig
from jaxinfra.train.optimizer import decayed, make_optimizer, matrices, schedule
from tests.jaxinfra.train.tiny import BIASED, DENSE, SPARSE, differences, random_params


def test_rate_rises_then_falls_along_a_cosine():
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1), 110)
    values = np.array([float(rate(jnp.asarray(i, jnp.int32))) for i in range(111)])
    assert values[0] > 0
    np.testing.assert_allclose(np.diff(values[:11]), np.diff(values[:11])[0], rtol=1e-4)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2
    np.testing.assert_allclose(values[10:], cosine, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("config", [DENSE, BIASED, SPARSE], ids=lambda c: c.family)
def test_decay_is_on_matrices_alone(config, name):
    """With zero gradients nothing but decay moves a parameter."""
    settings = OptimizerConfig(name=name, learning_rate=0.5, warmup_steps=0, weight_decay=0.2)
    tx = make_optimizer(settings, 10)
    params = jax.tree.map(jnp.ones_like, random_params(config, 0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, leaf in jax.tree.leaves_with_path(updates):
        still = path[-1].name.endswith(("norm", "bias"))
        np.testing.assert_allclose(leaf, 0.0 if still else -0.1, rtol=1e-6, err_msg=str(path))
    assert sum(jax.tree.leaves(decayed(params))) < len(jax.tree.leaves(params))


def test_adamw_is_the_formula():
    settings = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.3, clip_norm=1e9)
    tx = make_optimizer(settings, 10**9)
    params = random_params(DENSE, 0)
    state, q = tx.init(params), np.asarray(params.layers.attn.q, np.float64)
    m, v = np.zeros_like(q), np.zeros_like(q)
    for i in range(1, 4):
        grads = random_params(DENSE, i)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grads.layers.attn.q, np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        direction = m / (1 - 0.9**i) / (np.sqrt(v / (1 - 0.95**i)) + 1e-8)
        q = q - 0.1 * (direction + 0.3 * q)
    assert differences(params.layers.attn.q, q) < 1e-5


def test_clipping_scales_the_whole_gradient():
    grads = jax.tree.map(lambda leaf: 100.0 * leaf, random_params(DENSE, 3))
    params = random_params(DENSE, 0)
    clipped = [
        make_optimizer(OptimizerConfig(warmup_steps=0, clip_norm=norm, eps=1.0), 10)
        for norm in (1.0, float(optax.tree.norm(grads)) * 2)
    ]
    small, large = (tx.update(grads, tx.init(params), params)[0] for tx in clipped)
    scaled = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)
    again, _ = clipped[1].update(scaled, clipped[1].init(params), params)
    assert differences(small, again) < 1e-5
    assert differences(small, large) > 1e-2


def _stacks(params):
    """(name, float64 [..., rows, columns]) of what Muon takes, heads merged into a matrix."""
    for path, axes in jax.tree.leaves_with_path(matrices(params), is_leaf=_is_axes):
        leaf = params
        for entry in path:
            leaf = getattr(leaf, entry.name)
        leaf = np.asarray(leaf, np.float64)
        if path[-1].name in "qkv":
            leaf = leaf.reshape(*leaf.shape[:2], -1)
        elif path[-1].name == "o":
            leaf = leaf.reshape(leaf.shape[0], -1, leaf.shape[-1])
        assert axes is not None
        yield path[-1].name, leaf


def _is_axes(node) -> bool:
    return isinstance(node, optax.contrib.MuonDimensionNumbers)


@pytest.mark.parametrize("config", [DENSE, BIASED, SPARSE], ids=lambda c: c.family)
def test_muon_orthogonalises_every_matrix_of_every_stack(config):
    settings = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
    tx = make_optimizer(settings, 10)
    params = random_params(config, 0)
    grads = random_params(config, 1)
    # Layers and experts of very different size: only one by one do they all come out orthogonal.
    grads = jax.tree.map(
        lambda g: g * jnp.reshape(jnp.logspace(0, -3, len(g)), (-1,) + (1,) * (g.ndim - 1)), grads
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    names = set()
    for name, update in _stacks(updates):
        names.add(name)
        values = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(max(update.shape[-2:])))
        assert values.min() > 0.3 and values.max() < 1.4, (name, values.min(), values.max())
    assert names == {"q", "k", "v", "o", "gate", "up", "down"}
    # What it does not take moves as in the first step of Adam with Nesterov momentum.
    for update in (updates.embed, updates.final_norm, updates.layers.attn_norm):
        assert np.abs(np.asarray(update)).max() < 1.5


def test_that_check_rejects_adam_and_matrices_merged_over_layers():
    params, grads = random_params(DENSE, 0), random_params(DENSE, 1)
    tx = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.0), 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    q = np.asarray(updates.layers.attn.q, np.float64)
    values = np.linalg.svd(q.reshape(len(q), 16, -1), compute_uv=False) / (0.2 * np.sqrt(24))
    assert values.max() > 1.4
    whole = np.array(grads.layers.attn.q, np.float64).reshape(2 * 16, -1)
    whole[16:] /= 1000
    u, _, vt = np.linalg.svd(whole, full_matrices=False)
    merged = np.linalg.svd((u @ vt).reshape(2, 16, -1), compute_uv=False)
    assert merged.min() < 0.3


def test_settings_out_of_range_are_refused():
    for bad in ({"learning_rate": 0.0}, {"b1": 1.0}, {"clip_norm": -1.0}, {"final_fraction": 2.0},
                {"learning_rate": float("nan")}, {"name": "sgd"}):  # fmt: skip
        with pytest.raises(UserError, match=f"optimizer: .*{next(iter(bad))}="):
            OptimizerConfig(**bad)
