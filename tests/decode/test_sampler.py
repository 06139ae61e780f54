"""The sampler's distributions against plain numpy, by many draws and by their log-probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.packing import FLOATS, INTEGERS
from decode.sampler import SEEN, Wishes, sample, uniform

V = 96
NEUTRAL = {
    "top_k": 0, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0,
    "presence": 0.0, "frequency": 0.0,
}  # fmt: skip
LOGITS = np.random.default_rng(0).normal(size=V).astype(np.float32) * 2


@functools.cache
def _sample():
    return jax.jit(sample)


def draw(S=4000, counts=None, bias=None, mask=None, logits=LOGITS, plain=False, **wishes):
    """S draws at positions 0 to S - 1 by one key; all of one wish."""
    rows = {}
    for name, value in {**NEUTRAL, "key_0": 5, "key_1": 6, **wishes}.items():
        dtype = jnp.int32 if name in INTEGERS else jnp.float32
        assert name in INTEGERS + FLOATS
        rows[name] = jnp.full((S,), value, dtype)
    tile = lambda a, dtype: jnp.tile(jnp.asarray(a, dtype)[None], (S, 1))  # noqa: E731
    packed = np.packbits(np.ones(V, bool) if mask is None else mask, bitorder="little")
    wanted = Wishes(
        tile(np.zeros(V) if counts is None else counts, jnp.int32),
        tile(np.zeros(V) if bias is None else bias, jnp.float32), jnp.arange(S),
        tile(packed.view(np.uint32), jnp.uint32), jnp.ones(4, jnp.int32),
    )  # fmt: skip
    return _sample()(
        tile(logits, jnp.float32), rows, jnp.arange(S, dtype=jnp.int32), None if plain else wanted
    )


def softmax(x):
    x = np.exp(x - np.max(x))
    return x / x.sum()


def truncated(p, top_k=0, top_p=1.0, min_p=0.0):
    """The same by sorting."""
    order = np.argsort(-p, kind="stable")
    if top_k:
        p = np.where(p >= p[order[top_k - 1]], p, 0)
        p = p / p.sum()
    sums = np.cumsum(p[order])
    last = np.searchsorted(sums, top_p - 1e-7)
    p = np.where(p >= p[order[min(last, V - 1)]], p, 0)
    p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


def agrees(tokens, p):
    """Whether draws follow p: a chi-square test at one in a million."""
    counts = np.bincount(np.asarray(tokens), minlength=V)
    if counts[p == 0].any():
        return False
    wanted = p * len(tokens)
    many = wanted > 5
    rest = [counts[~many].sum()], [wanted[~many].sum()]
    counts, wanted = (np.append(a[many], b) for a, b in zip((counts, wanted), rest, strict=True))
    squares = ((counts - wanted) ** 2 / np.maximum(wanted, 1e-9))[wanted > 1].sum()
    free = max((wanted > 1).sum() - 1, 1)
    return squares < free + 5 * np.sqrt(2 * free) + 12


CASES = {
    "plain": {}, "cold": {"temperature": 0.5}, "hot": {"temperature": 1.7}, "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8}, "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.03},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution_that_is_told(case):
    wishes = dict(CASES[case])
    p = softmax(LOGITS.astype(np.float64) / wishes.get("temperature", 1.0))
    cut = {k: v for k, v in wishes.items() if k != "temperature"}
    p = truncated(p, **cut)
    drawn = draw(**wishes)
    assert agrees(drawn.tokens, p)
    np.testing.assert_allclose(drawn.logps, np.log(p[np.asarray(drawn.tokens)]), atol=2e-5)
    best = np.asarray(drawn.top_logps)[0]
    np.testing.assert_allclose(np.exp(best), np.sort(p)[::-1][:20], atol=2e-6)


@pytest.mark.parametrize("case, wrong", [
    ("top_k", {"top_k": 8}), ("top_p", {"top_p": 0.7}), ("min_p", {"min_p": 0.2}),
    ("cold", {"temperature": 0.6}), ("plain", {"temperature": 1.1}),
])  # fmt: skip
def test_a_wrong_distribution_is_found(case, wrong):
    wishes = dict(CASES[case]) | wrong
    p = softmax(LOGITS.astype(np.float64) / CASES[case].get("temperature", 1.0))
    p = truncated(p, **{k: v for k, v in CASES[case].items() if k != "temperature"})
    assert not agrees(draw(**wishes).tokens, p)


def test_penalties_bias_and_mask():
    counts = np.zeros(V, int)
    counts[[3, 4]] = SEEN + 2, 1
    counts[5] = SEEN
    logits = LOGITS.astype(np.float64).copy()
    seen = counts > 0
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
    logits[[3, 4]] -= 0.3 * np.array([2, 1]) + 0.7
    bias = np.zeros(V)
    bias[9] = 1.5
    mask = np.ones(V, bool)
    mask[int(np.argmax(logits))] = False
    p = softmax(np.where(mask, logits + bias, -np.inf))
    drawn = draw(counts=counts, bias=bias, mask=mask, repetition=1.5, frequency=0.3, presence=0.7)
    assert agrees(drawn.tokens, p)
    np.testing.assert_allclose(drawn.logps, np.log(p[np.asarray(drawn.tokens)]), atol=2e-5)


def test_greedy_is_the_likeliest_and_told_at_temperature_one():
    drawn = draw(S=4, temperature=0.0)
    assert set(np.asarray(drawn.tokens).tolist()) == {int(np.argmax(LOGITS))}
    np.testing.assert_allclose(drawn.logps, np.log(softmax(LOGITS).max()), atol=1e-5)


def test_without_wishes_the_draws_are_the_same():
    for temperature in (0.0, 0.7):
        plain, asked = (draw(temperature=temperature, plain=p) for p in (True, False))
        assert np.array_equal(plain.tokens, asked.tokens)
        assert np.array_equal(plain.logps, asked.logps) and not np.any(plain.top_logps)


def test_a_token_of_no_weight_is_never_drawn():
    logits = np.full(V, -np.inf, np.float32)
    logits[[10, 70]] = 0.0
    drawn = np.asarray(draw(logits=logits).tokens)
    assert set(drawn.tolist()) == {10, 70} and abs((drawn == 10).mean() - 0.5) < 0.05


def test_numbers_differ_by_key_and_by_position():
    keys = jnp.asarray([1, 1, 2, 1], jnp.int32)
    other = jnp.asarray([1, 1, 1, 2], jnp.int32)
    numbers = np.asarray(uniform(keys, other, jnp.asarray([0, 1, 0, 0], jnp.int32)))
    assert len(set(numbers.tolist())) == 4 and (numbers >= 0).all() and (numbers < 1).all()
