"""Attention: every implementation against float64 mathematics, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.flash_attention import chunked, supported

B, T, N, K, H = 2, 13, 4, 2, 8

CASES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 4},
    "two-sided window": {"window": 4},
    "soft cap": {"causal": True, "soft_cap": 2.0},
    "scale": {"causal": True, "scale": 0.5},
    "segments": {"causal": True, "segment_ids": np.repeat([[1, 2, 0]], B, 0).repeat([5, 6, 2], 1)},
    "offset": {"causal": True, "q_offset": np.asarray([3, 0])},
}


def inputs(S: int = T, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, n, h, H)) for n, h in ((T, N), (S, K), (S, K)))
    return tuple(jnp.asarray(3 * a, dtype) for a in (q, k, v))


def oracle(q, k, v, *, causal=False, window=None, soft_cap=None, scale=None, segment_ids=None,
           q_offset=0):  # fmt: skip
    """One query and head at a time, in float64 NumPy."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    offset = np.broadcast_to(q_offset, (B,))
    for b, t, n in np.ndindex(q.shape[:3]):
        logits = k[b, :, n // (N // K)] @ q[b, t, n] * (H**-0.5 if scale is None else scale)
        if soft_cap:
            logits = soft_cap * np.tanh(logits / soft_cap)
        s, position = np.arange(k.shape[1]), t + offset[b]
        seen = np.ones(k.shape[1], bool)
        if causal:
            seen &= s <= position
        if window is not None:
            seen &= s > position - window
        if segment_ids is not None:
            seen &= segment_ids[b] == segment_ids[b][t]
        if seen.any():
            weights = np.exp(logits[seen] - logits[seen].max())
            out[b, t, n] = weights @ v[b, seen, n // (N // K)] / weights.sum()
    return out


def run(implementation, q, k, v, **case):
    """A compiled call; "chunked" in blocks that do not divide T."""
    if implementation == "chunked":
        if "segment_ids" in case:
            case["segment_ids"] = (case["segment_ids"], case["segment_ids"])
        return chunked.attention(q, k, v, block=5, **case)[0]
    return attention(q, k, v, implementation=implementation, **case)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_forward(implementation, name):
    q, k, v = inputs(T + 3 if name == "offset" else T)
    got = jax.jit(functools.partial(run, implementation, **CASES[name]))(q, k, v)
    np.testing.assert_allclose(got, oracle(q, k, v, **CASES[name]), atol=1e-5)


WRONG = {
    "mask off by one": {"causal": True, "q_offset": 1},
    "window off by one": {"causal": True, "window": 5},
    "no mask": {},
    "scale left out": {"causal": True, "window": 4, "scale": 1.0},
}


@pytest.mark.parametrize("name", WRONG)
def test_the_check_rejects(name):
    q, k, v = inputs()
    got = attention(q, k, v, implementation="reference", **WRONG[name])
    assert np.max(np.abs(got - oracle(q, k, v, causal=True, window=4))) > 1e-3


@pytest.mark.parametrize("name", ["soft cap", "segments"])
def test_chunked_gradient_is_the_references(name):
    q, k, v = inputs()

    def gradient(implementation):
        def loss(*arrays):
            return jnp.sum(jnp.sin(run(implementation, *arrays, **CASES[name])))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for got, want in zip(gradient("chunked"), gradient("reference"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(implementation):
    q, k, v = inputs()
    case = {"causal": True, "q_offset": np.asarray([-4, 0])}

    def loss(*arrays):
        out = run(implementation, *arrays, **case)
        return jnp.sum(out**2), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert np.all(np.asarray(out)[0, :4] == 0)
    assert all(np.isfinite(g).all() for g in gradients)


def test_log_sum_exp_merges_halves_of_the_keys():
    q, k, v = inputs()
    whole = attention(q, k, v)
    one, lse1 = attention(q, k[:, :6], v[:, :6], return_lse=True)
    two, lse2 = attention(q, k[:, 6:], v[:, 6:], return_lse=True)
    weight = jax.nn.sigmoid(lse1 - lse2).swapaxes(1, 2)[..., None]
    np.testing.assert_allclose(weight * one + (1 - weight) * two, whole, atol=1e-5)


def test_large_logits_do_not_overflow():
    q, k, v = inputs()
    got = attention(30 * q, k, v, causal=True)
    np.testing.assert_allclose(got, oracle(30 * q, k, v, causal=True), atol=1e-4)


def test_long_rows_never_hold_the_matrix_of_logits():
    T = 4096
    spec = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    text = jax.jit(functools.partial(attention, causal=True)).lower(spec, spec, spec).as_text()
    assert f"{T}x{T}" not in text and f"512x{T}" in text
    dense = functools.partial(attention, causal=True, implementation="reference")
    assert f"{T}x{T}" in jax.jit(dense).lower(spec, spec, spec).as_text()


def test_refusals_name_the_reason():
    shapes = (B, T, N, H), (B, T, K, H)
    assert supported("reference", *shapes, jnp.float32) is None
    assert "GPU" in supported("cudnn", *shapes, jnp.bfloat16, platform="cpu")
    assert "float32" in supported("cudnn", *shapes, jnp.float32, platform="gpu")
    assert "segment" in supported("cudnn", *shapes, jnp.bfloat16, platform="gpu", segment_ids=1)
    assert supported("cudnn", *shapes, jnp.bfloat16, platform="gpu", causal=True) is None
    assert "no implementation" in supported("fast", *shapes, jnp.float32)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="GPU"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="multiple of K"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="dtypes"):
        attention(q, k.astype(jnp.bfloat16), v)
