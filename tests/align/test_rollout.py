"""Answers drawn inside a program: against the generator, against the trainer, and their shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align.logprobs import answer_logps, log_distribution, token_logps
from align.losses import mismatch_kl
from align.rollout import rollout
from align.tasks import PAD, STOP
from jaxinfra.generate import Sampling, generate
from tests.align.tiny import MODEL, PROBLEMS, params

T, G = 6, 3
CUT = Sampling(temperature=0.7, top_k=9, top_p=0.8)


@functools.cache
def drawn(sampling=CUT, group_size=G, max_new_tokens=T):
    draw = jax.jit(
        lambda key: rollout(
            params(), MODEL, PROBLEMS["prompts"], PROBLEMS["lengths"], key, group_size=group_size,
            max_new_tokens=max_new_tokens, sampling=sampling, stop_id=STOP,
        )
    )  # fmt: skip
    return draw(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=2)
def trainers(tokens, lengths, sampling):
    return answer_logps(params(), MODEL, tokens, lengths, T, sampling)


def mismatch(sampling) -> float:
    r = drawn()
    return float(mismatch_kl(trainers(r.tokens, r.lengths, sampling)[0], r.logps, r.mask))


def test_rows_are_prompt_answer_and_padding():
    r = drawn()
    for row in range(len(r.lengths)):
        n, m = int(r.lengths[row]), int(r.mask[row].sum())
        problem = row // G
        assert np.array_equal(r.tokens[row, :n], PROBLEMS["prompts"][problem, :n])
        assert np.array_equal(r.tokens[row, n : n + m], r.answer[row, :m])
        assert np.all(r.tokens[row, n + m :] == PAD) and np.all(r.mask[row, :m] == 1)
        ends = STOP in r.answer[row, :m].tolist()
        assert bool(r.stopped[row]) == ends and (m == T or ends)
        assert STOP not in r.answer[row, : m - 1].tolist()
        assert not np.any(np.asarray(r.logps[row, m:]))
    assert 0 < float(r.stopped.mean()) < 1


def test_greedy_answers_are_the_generators():
    r = drawn(Sampling(), 1)
    prompts = [
        p[:n].tolist() for p, n in zip(PROBLEMS["prompts"], PROBLEMS["lengths"], strict=True)
    ]
    want = generate(params(), MODEL, prompts, max_new_tokens=T, stop_ids=[STOP]).tokens
    assert [row[: int(m.sum())].tolist() for row, m in zip(r.answer, r.mask, strict=True)] == want


def test_the_trainers_log_probabilities_are_the_samplers():
    assert mismatch(CUT) < 1e-10
    r = drawn()
    logps, _ = trainers(r.tokens, r.lengths, CUT)
    assert float(jnp.max(jnp.abs((logps - r.logps) * r.mask))) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [Sampling(temperature=1.0, top_k=9, top_p=0.8), Sampling(temperature=0.7),
     Sampling(temperature=0.7, top_p=0.8)],
    ids=["another temperature", "renormalisation ignored", "top-k ignored"],
)  # fmt: skip
def test_a_trainer_with_another_distribution_is_told(wrong):
    assert mismatch(wrong) > 1e-4


def test_draws_follow_the_distribution():
    """Frequencies of the first token over many samples of one prompt."""
    draw = jax.jit(
        lambda key: rollout(
            params(), MODEL, PROBLEMS["prompts"][:1], PROBLEMS["lengths"][:1], key, group_size=4096,
            max_new_tokens=1, sampling=CUT, stop_id=STOP,
        )
    )  # fmt: skip
    r = draw(jax.random.key(1))
    counts = np.bincount(np.asarray(r.answer[:, 0]), minlength=MODEL.vocab_size) / 4096
    tokens = np.unique(np.asarray(r.answer[:, 0]))
    p = np.zeros(MODEL.vocab_size)
    for token in tokens:
        p[token] = np.exp(r.logps[np.flatnonzero(r.answer[:, 0] == token)[0], 0])
    np.testing.assert_allclose(p.sum(), 1.0, atol=1e-5)
    np.testing.assert_allclose(counts, p, atol=0.03)


def test_cut_distributions():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    p = jnp.exp(log_distribution(logits, Sampling(temperature=1.0, top_p=0.7)))
    np.testing.assert_allclose(p, [[0.625, 0.375, 0, 0]], atol=1e-6)
    p = jnp.exp(log_distribution(logits, Sampling(temperature=1.0, top_k=3)))
    np.testing.assert_allclose(p, [[0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]], atol=1e-6)
    gradient = jax.grad(
        lambda x: token_logps(x[None], jnp.asarray([[1]]), Sampling(1.0, top_p=0.7))[0].sum()
    )(logits)
    np.testing.assert_allclose(gradient, [[-0.625, 0.625, 0, 0]], atol=1e-6)


def test_a_drawn_token_is_never_cut_off():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    logps, entropy = token_logps(logits[None], jnp.asarray([[3]]), Sampling(1.0, top_p=0.7))
    np.testing.assert_allclose(logps, [[np.log(0.05 / 0.85)]], atol=1e-6)
    assert np.isfinite(entropy)


def test_logits_by_blocks_are_the_same(monkeypatch):
    r = drawn()
    want = trainers(r.tokens, r.lengths, CUT)
    monkeypatch.setattr("align.logprobs.MOST_LOGITS", T * MODEL.vocab_size * 5)
    got = jax.jit(lambda a, b: answer_logps(params(), MODEL, a, b, T, CUT))(r.tokens, r.lengths)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="exceed the model's max_seq_len=32"):
        drawn(max_new_tokens=40)
