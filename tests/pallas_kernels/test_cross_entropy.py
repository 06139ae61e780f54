"""Cross-entropy of a linear layer in blocks: sums and gradients of the plain reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import chunked, reference

M, D, V = 21, 8, 50


def inputs():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((M, D)), rng.standard_normal((D, V))
    weights = rng.uniform(0.5, 1.5, M) * (np.arange(M) % 5 != 0)
    targets = rng.integers(0, V, M)
    return (jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32),
            jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32))  # fmt: skip


CASES = {"plain": {}, "z-loss": {"z_loss": 0.1}, "soft cap": {"soft_cap": 2.0, "z_loss": 0.01}}


def both(case, block=8):
    x, w, targets, weights = inputs()

    def run(fn, x, w):
        (loss, nll), gradients = jax.value_and_grad(
            lambda x, w: fn(x, w, targets, weights), argnums=(0, 1), has_aux=True
        )(x, w)
        return loss, nll, *gradients

    def blocks(x, w, t, c):
        return chunked.linear_cross_entropy(
            x, w, t, c, case.get("z_loss", 0.0), case.get("soft_cap"), block
        )

    plain = functools.partial(reference.linear_cross_entropy, **case)
    return [jax.jit(functools.partial(run, fn))(x, w) for fn in (blocks, plain)]


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, block):
    got, want = both(CASES[name], block)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_reference_is_the_negative_log_likelihood():
    x, w, targets, weights = inputs()
    z = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(M), targets]
    loss, same = reference.linear_cross_entropy(x, w, targets, weights)
    np.testing.assert_allclose(loss, np.sum(nll * np.asarray(weights)), rtol=1e-6)
    assert loss == same


def test_the_check_rejects_near_misses():
    got, want = both({})
    for wrong in ({"z_loss": 1e-3}, {"soft_cap": 20.0}):
        other = both(wrong)[0]
        assert not np.allclose(other[0], want[0], rtol=2e-5)
        assert not np.allclose(other[3], want[3], rtol=2e-5, atol=2e-6)
    assert np.allclose(got[0], want[0], rtol=2e-5)


def test_logits_of_all_rows_never_exist():
    rows, words = 1024, 333
    x = jax.ShapeDtypeStruct((rows, D), jnp.float32)
    w = jax.ShapeDtypeStruct((D, words), jnp.float32)
    t = jax.ShapeDtypeStruct((rows,), jnp.int32)
    c = jax.ShapeDtypeStruct((rows,), jnp.float32)

    def loss(fn, x, w, t, c):
        return fn(x, w, t, c)[0]

    def text(fn):
        return jax.jit(jax.grad(functools.partial(loss, fn), argnums=(0, 1))).lower(x, w, t, c)

    def blocks(x, w, t, c):
        return chunked.linear_cross_entropy(x, w, t, c, 0.0, None, 128)

    assert f"{rows}x{words}" not in text(blocks).as_text()
    assert f"{rows}x{words}" in text(reference.linear_cross_entropy).as_text()
