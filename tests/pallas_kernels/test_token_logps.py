"""Log-probabilities and entropies of a linear layer: plain XLA by blocks, and what is taken."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.measure.structure import memory
from pallas_kernels import linear_cross_entropy, token_logps
from pallas_kernels.cross_entropy import blocks, choose, reference, supported

M, D, V = 21, 8, 50
CASES = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "temperature": {"temperature": 0.6},
    "both, transposed": {"soft_cap": 2.0, "temperature": 1.7, "transpose_w": True},
}


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, M)
    targets[:4] = 0, V - 1, 15, 16  # the first, the last, and beside a block's edge
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((M, D), (D, V)))
    return x, w, jnp.asarray(targets, jnp.int32)


def both(fn, x, w, targets, **options):
    """What `fn` gives, and the gradients for a cotangent of either result."""
    of_logp, of_entropy = jnp.asarray(np.random.default_rng(1).normal(size=(2, M)), jnp.float32)
    if options.get("transpose_w"):
        w = w.T

    def total(x, w):
        logp, entropy = fn(x, w, targets, **options)
        return jnp.sum(logp * of_logp + entropy * of_entropy), (logp, entropy)

    (dx, dw), out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, w)
    return *out, dx, dw.T if options.get("transpose_w") else dw


def by_reference(x, w, targets, **options):
    return both(reference.token_logps, x, w, targets, **drop(options))


def drop(options):
    return {k: v for k, v in options.items() if k != "transpose_w"}


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("name", CASES)
def test_blocks_give_the_references_values_and_gradients(name, block):
    drawn = inputs()
    got = both(token_logps, *drawn, block=block, **CASES[name])
    for one, other in zip(got, by_reference(*drawn, **CASES[name]), strict=True):
        np.testing.assert_allclose(one, other, rtol=3e-5, atol=1e-5)


def test_the_reference_is_the_definition():
    x, w, targets = inputs()
    z = np.asarray(x, np.float64) @ np.asarray(w, np.float64) / 0.5
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    logp, entropy = reference.token_logps(x, w, targets, temperature=0.5)
    np.testing.assert_allclose(logp, np.log(p[np.arange(M), targets]), rtol=1e-5)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharp", [1.0, 60.0])
def test_large_logits_overflow_nowhere(sharp):
    x, w, targets = inputs()
    got = both(token_logps, x * sharp, w, targets, block=16)
    for one, other in zip(got, by_reference(x * sharp, w, targets), strict=True):
        assert np.all(np.isfinite(one))
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-5)


def forgetful(parts):
    """A merge that adds the blocks' sums up as though their largest logits were the same."""
    tops, totals, drifts, hits = parts
    total, drift = jnp.sum(totals, axis=0), jnp.sum(drifts, axis=0)
    return jnp.sum(hits, axis=0), tops[0] + jnp.log(total), jnp.log(total) - drift / total


def entropy_alone(cotangents, lse, entropy):
    """Slopes that leave out that an entropy's own value weighs the weights."""
    return blocks.Slopes(cotangents[0], cotangents[1], -cotangents[2], lse)


@pytest.mark.parametrize(("name", "wrong"), [("merge", forgetful), ("slopes_of", entropy_alone)])
def test_near_misses_are_rejected(name, wrong, monkeypatch):
    drawn = inputs()
    wanted = by_reference(*drawn)
    monkeypatch.setattr(blocks, name, wrong)
    got = both(token_logps, *drawn, block=16)
    close = [np.allclose(a, b, rtol=3e-5, atol=1e-5) for a, b in zip(got, wanted, strict=True)]
    assert close == ([False] * 4 if name == "merge" else [True, True, False, False])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_target_that_is_no_word_gives_nan_in_its_row_alone(implementation):
    x, w, targets = inputs()
    targets = targets.at[3].set(V).at[5].set(-1)
    logp, entropy = token_logps(x, w, targets, implementation=implementation)
    assert list(np.flatnonzero(np.isnan(logp))) == [3, 5] and np.all(np.isfinite(entropy))


def test_float16_keeps_small_gradients():
    x, w, targets = inputs(jnp.float16)

    def mean(fn, x, w):
        return jnp.sum(fn(x, w, targets)[0]) * 1e-4

    got = jax.grad(functools.partial(mean, token_logps), (0, 1))(x, w)
    exact = [a.astype(jnp.float32) for a in (x, w)]
    wanted = jax.grad(functools.partial(mean, reference.token_logps), (0, 1))(*exact)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == jnp.float16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2e-3, atol=1e-7)


def test_logits_of_all_words_never_exist():
    rows, words = 1024, 24_576
    shapes = [((rows, D), jnp.float32), ((D, words), jnp.float32), ((rows,), jnp.int32)]
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def gradient(fn):
        total = lambda x, w, t: sum(jnp.sum(part) for part in fn(x, w, t))  # noqa: E731
        return jax.jit(jax.grad(total, (0, 1))).lower(*arrays)

    ours = gradient(functools.partial(token_logps, block=1024))
    theirs = gradient(reference.token_logps)
    assert f"{rows}x{words}" not in ours.as_text() and f"{rows}x{words}" in theirs.as_text()
    temporary = [memory(x.compile()).temporary for x in (ours, theirs)]
    assert temporary[0] < 4 * rows * words / 4 < 4 * rows * words < temporary[1]


def test_blocks_are_wide_enough_and_bounded():
    assert blocks.width(8192) == 8192 and blocks.width(2**20) == blocks.NARROWEST
    assert all(blocks.width(m) % 128 == 0 for m in (1, 7, 1000, 5000))


def test_a_kernel_that_was_not_timed_is_not_taken_unasked(monkeypatch, caplog):
    from pallas_kernels.cross_entropy import product

    asked = ((512, 128), (128, 256), jnp.bfloat16)
    assert supported("mosaic_gpu", *asked, platform="gpu") is None
    monkeypatch.setitem(product.TIMED, "token_logps", ())
    name, why = choose("token_logps", *asked, platform="gpu")
    assert name == "xla" and "not timed to be faster" in why
    monkeypatch.setitem(product.TIMED, "token_logps", ("mosaic_gpu",))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose("token_logps", *asked, platform="gpu")[0] == "mosaic_gpu"
    assert choose("linear_cross_entropy", *asked, platform="gpu")[0] == "xla"
    with caplog.at_level(logging.DEBUG, logger=product.__name__):
        token_logps(*inputs())
    assert "xla (mosaic_gpu: Mosaic GPU needs an NVIDIA Hopper GPU" in caplog.text


@pytest.mark.parametrize(
    ("x", "w", "dtype", "says"),
    [
        ((8, 96), (96, 128), jnp.bfloat16, "multiple of 64, not 96"),
        ((8, 64), (64, 100), jnp.bfloat16, "multiple of 64, not 100"),
        ((8, 64), (64, 128), jnp.float32, "bfloat16, not float32"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(x, w, dtype, says):
    assert says in supported("mosaic_gpu", x, w, dtype, platform="gpu")
    x, w = (jnp.zeros(shape, dtype) for shape in (x, w))
    with pytest.raises(ValueError, match="arrays are on cpu"):
        token_logps(x, w, jnp.zeros(8, jnp.int32), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=says):
        token_logps(x, w, jnp.zeros(8, jnp.int32), interpret=True)
    assert supported("mosaic_gpu", (8, 64), (104, 64), jnp.bfloat16, transpose_w=True,
                     platform="gpu") is None  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w": jnp.zeros((D + 1, V))}, "want .M, D. and .D, V."),
        ({"transpose_w": True}, "want .M, D. and .V, D."),
        ({"targets": jnp.zeros(M)}, "integers"),
        ({"targets": jnp.zeros(M - 1, jnp.int32)}, "targets"),
        ({"w": jnp.zeros((D, V), jnp.bfloat16)}, "one floating-point dtype"),
        ({"x": jnp.zeros((0, D)), "targets": jnp.zeros(0, jnp.int32)}, "must not be empty"),
        ({"temperature": 0.0}, "temperature=0.0; want it above zero"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0"),
        ({"implementation": "cuda"}, "no implementation 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    x, w, targets = inputs()
    with pytest.raises(ValueError, match=says):
        token_logps(**{"x": x, "w": w, "targets": targets} | change)


def test_a_cross_entropy_is_the_weighted_sum_of_log_probabilities():
    x, w, targets = inputs()
    weights = jnp.arange(M, dtype=jnp.float32)
    loss, nll = linear_cross_entropy(x, w.T, targets, weights, transpose_w=True)
    wanted = -jnp.sum(weights * token_logps(x, w, targets)[0])
    np.testing.assert_allclose([loss, nll], [wanted, wanted], rtol=1e-5)
