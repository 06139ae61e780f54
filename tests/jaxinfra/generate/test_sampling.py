"""Draws follow the exact distribution of temperature, top-k and top-p; wrong orders are found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import UserError
from jaxinfra.generate.sampling import Sampling, _least_kept, row_keys, sample

DRAWS = 20_000
LOGITS = np.array([1.1, 2.0, -0.5, 0.3, 1.7, 0.9, -1.2, 2.3, 0.0, -3.0, 0.6, 1.4], np.float32)
SETTINGS = [
    Sampling(1.0),
    Sampling(0.7, seed=3),
    Sampling(1.8, top_k=4),
    Sampling(1.0, top_p=0.7),
    Sampling(2.5, top_k=6, top_p=0.6),
    Sampling(1.0, top_k=50, top_p=0.05),
]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def exact(s: Sampling, *, extra_k=0, p_first=False, cut=0) -> np.ndarray:
    """The distribution in float64 with a sort; the options make it wrong."""
    x = LOGITS.astype(np.float64) / (1.0 if p_first else s.temperature)
    order = np.argsort(-x)
    keep = np.zeros(len(x), bool)
    keep[order[: (s.top_k or len(x)) + extra_k]] = True
    p = softmax(np.where(keep, x, -np.inf))
    count = int(np.searchsorted(np.cumsum(p[order]), s.top_p - 1e-12)) + 1 + cut
    keep[order[max(count, 1) :]] = False
    if p_first:
        x = x / s.temperature
    return softmax(np.where(keep, x, -np.inf))


@functools.cache
def counts(s: Sampling) -> np.ndarray:
    draw = jax.jit(sample, static_argnames="sampling")
    rows = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, len(LOGITS)))
    positions = jnp.full((DRAWS,), 7, jnp.int32)
    tokens = draw(rows, sampling=s, keys=row_keys(s, range(DRAWS)), positions=positions)
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS))


def fits(found: np.ndarray, p: np.ndarray) -> bool:
    """Pearson's statistic within six deviations of its mean, and nothing outside the support."""
    if found[p == 0].any():
        return False
    wanted, found = DRAWS * p[p > 0], found[p > 0]
    freedom = len(wanted) - 1
    return (
        float(((found - wanted) ** 2 / wanted).sum()) <= freedom + 6 * np.sqrt(2 * freedom) + 1e-9
    )


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_draws_follow_the_distribution(s):
    assert fits(counts(s), exact(s))


@pytest.mark.parametrize(
    ("s", "wrong"),
    [
        (SETTINGS[2], {"extra_k": 1}),
        (SETTINGS[2], {"extra_k": -1}),
        (SETTINGS[3], {"cut": 1}),
        (SETTINGS[3], {"cut": -1}),
        (SETTINGS[4], {"p_first": True}),
        (SETTINGS[1], {"p_first": True, "cut": -1}),
    ],
    ids=str,
)
def test_wrong_distributions_are_found(s, wrong):
    assert not np.allclose(exact(s, **wrong), exact(s))
    assert not fits(counts(s), exact(s, **wrong))


def test_temperature_zero_is_argmax():
    logits = jax.random.normal(jax.random.key(1), (5, 40))
    keys = row_keys(Sampling(), range(5))
    tokens = sample(logits, Sampling(), keys, jnp.arange(5))
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, -1))


def test_the_bisection_keeps_what_a_sort_keeps():
    logits = 3 * jax.random.normal(jax.random.key(2), (64, 300))
    p = np.asarray(jax.nn.softmax(logits), np.float32)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        kept = (p >= np.asarray(_least_kept(jnp.asarray(p), top_p))[:, None]).sum(1)
        descending = -np.sort(-p.astype(np.float64), axis=1)
        wanted = (np.cumsum(descending, axis=1) < top_p).sum(1) + 1
        np.testing.assert_array_equal(kept, wanted)


def test_a_draw_depends_on_seed_row_and_position_alone():
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (4, len(LOGITS)))
    s = Sampling(1.5, seed=9)

    def draw(seeds, positions, s=s):
        rows = logits[: len(seeds)]
        return [int(t) for t in sample(rows, s, row_keys(s, seeds), jnp.asarray(positions))]

    many = draw([5, 6, 7, 8], [3, 3, 3, 3])
    assert [draw([seed], [3])[0] for seed in (5, 6, 7, 8)] == many
    by_position = [draw([5], [position])[0] for position in range(20)]
    by_row = [draw([row], [3])[0] for row in range(20)]
    by_seed = [draw([5], [3], Sampling(1.5, seed=i))[0] for i in range(20)]
    assert min(len(set(by_position)), len(set(by_row)), len(set(by_seed))) > 3


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0},
     {"top_p": 1.1}, {"seed": -1}],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
