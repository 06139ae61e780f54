"""What no peer computes alike, on its definition: loops of numpy, expectations, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align import advantages as A
from align import losses
from align.aggregate import aggregate, whiten
from align.losses import PolicyLoss
from tests.align.cases import MASK

RNG = np.random.default_rng(3)
REWARDS, VALUES = RNG.normal(0, 1, (2, *MASK.shape)).astype(np.float32)
M = MASK.astype(np.float32)


def test_gae_passes_over_what_the_policy_did_not_write():
    gamma, lam = 0.9, 0.8
    advantages, returns = A.gae(*map(jnp.asarray, (REWARDS, VALUES, M)), gamma=gamma, lam=lam)
    for b in range(len(M)):
        own = np.flatnonzero(M[b])
        following, carried = 0.0, 0.0
        for t in own[::-1]:
            delta = REWARDS[b, t] + gamma * following - VALUES[b, t]
            carried = delta + gamma * lam * carried
            following = VALUES[b, t]
            np.testing.assert_allclose(advantages[b, t], carried, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(returns[b, t], carried + VALUES[b, t], rtol=1e-5, atol=1e-6)
        assert not np.any(np.asarray(advantages)[b][M[b] == 0])


def test_gae_of_a_long_horizon_is_the_return_minus_the_value():
    advantages, _ = A.gae(*map(jnp.asarray, (REWARDS, VALUES, M)), gamma=1.0, lam=1.0)
    togo = A.discounted(jnp.asarray(REWARDS), jnp.asarray(M))
    np.testing.assert_allclose(advantages, np.where(M > 0, togo - VALUES, 0), atol=1e-5)
    np.testing.assert_allclose(
        togo[:, 0], np.where(M[:, 0] > 0, (REWARDS * M).sum(1), 0), atol=1e-5
    )


def test_reinforce_pp_is_whitened_over_tokens():
    togo = np.asarray(A.discounted(jnp.asarray(REWARDS), jnp.asarray(M), gamma=0.95))
    inside = togo[M > 0]
    got = np.asarray(A.reinforce_pp(jnp.asarray(REWARDS), jnp.asarray(M), gamma=0.95))
    np.testing.assert_allclose(got[M > 0], (inside - inside.mean()) / inside.std(ddof=1), atol=1e-5)
    assert not got[M == 0].any()
    based = np.asarray(A.reinforce_pp_baseline(jnp.asarray(REWARDS[:, 0]), jnp.asarray(M), 4))
    centred = REWARDS[:, 0].reshape(2, 4)
    tokens = ((centred - centred.mean(1, keepdims=True)).reshape(-1, 1) * np.ones_like(M))[M > 0]
    np.testing.assert_allclose(
        based[M > 0], (tokens - tokens.mean()) / tokens.std(ddof=1), atol=1e-5
    )


def test_a_score_falls_on_the_last_token():
    got = A.at_last_token(jnp.arange(1.0, 9.0), jnp.asarray(M))
    assert np.argmax(got[0]) == 5 and np.argmax(got[3]) == 3 and not np.any(got[5])
    assert float(got[4, 5]) == 5.0


def test_overlong_answers_are_punished_softly():
    lengths = jnp.asarray([10.0, 80.0, 90.0, 100.0, 120.0])
    np.testing.assert_allclose(A.overlong_penalty(lengths, 100, 20), [0, 0, -0.5, -1, -1])


def test_groups_without_a_difference_are_told():
    rewards = jnp.asarray([1.0, 1.0, 0.0, 1.0, jnp.nan, 1.0, jnp.nan, jnp.nan])
    assert A.informative(rewards, 2).tolist() == [False, False, True, True] + [False] * 4


def distributions():
    """A policy and a reference over 12 tokens, the policy as a function of its logits."""
    logits, ref = jax.random.normal(jax.random.key(0), (2, 12))
    return logits, jax.nn.log_softmax(ref)


def true_kl(logits, ref):
    logps = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logps) * (logps - ref))


@pytest.mark.parametrize("kind", ["k1", "k3", "k1+", "k3+"])
def test_estimators_are_unbiased(kind):
    logits, ref = distributions()
    logps = jax.nn.log_softmax(logits)
    mean = jnp.sum(jnp.exp(logps) * losses.estimate_kl(logps[None], ref[None], kind)[0])
    np.testing.assert_allclose(mean, true_kl(logits, ref), rtol=1e-5)


@pytest.mark.parametrize(("kind", "right"), [("k1", False), ("k1+", True), ("k2", True),
                                             ("k3", False), ("k3+", True)])  # fmt: skip
def test_which_estimators_have_the_gradient_of_the_divergence(kind, right):
    logits, ref = distributions()
    p = jnp.exp(jax.nn.log_softmax(logits))

    def sampled(logits):
        return jnp.sum(p * losses.estimate_kl(jax.nn.log_softmax(logits)[None], ref[None], kind)[0])

    wanted = jax.grad(true_kl)(logits, ref)
    difference = jnp.max(jnp.abs(jax.grad(sampled)(logits) - wanted)) / jnp.max(jnp.abs(wanted))
    assert (difference < 1e-5) == right


def test_the_corrected_divergence_has_the_right_gradient_off_policy():
    """k3 times the ratio, on samples of an older policy: DeepSeek-V3.2's correction."""
    logits, ref = distributions()
    old = jax.nn.log_softmax(logits + jax.random.normal(jax.random.key(1), logits.shape))

    def sampled(logits, ratio):
        """Each token is a row that comes as often as the old policy has it."""
        logps = jax.nn.log_softmax(logits)[:, None]
        one = jnp.ones_like(logps)
        config = PolicyLoss(kl_coef=1.0, kl_ratio=ratio, aggregation="sequence-mean-token-sum")

        def row(lp, before, reference):
            return losses.policy_loss(
                lp, before, jnp.zeros(1), one[:1], config, ref_logps=reference
            )[0]

        each = jax.vmap(row)(logps[:, None], old[:, None, None], ref[:, None, None])
        return jnp.sum(jnp.exp(old) * each)

    wanted = jax.grad(true_kl)(logits, ref)
    slope = jax.jit(jax.grad(sampled), static_argnums=1)
    right = jnp.max(jnp.abs(slope(logits, True) - wanted))
    wrong = jnp.max(jnp.abs(slope(logits, False) - wanted))
    assert right < 1e-5 and wrong > 1e-2


def test_dual_clip_bounds_the_loss_of_bad_actions():
    logps = jnp.asarray([[2.0, 0.0, -1.0]])
    old, mask = jnp.zeros((1, 3)), jnp.ones((1, 3))
    config = PolicyLoss(dual_clip=3.0, aggregation="sequence-mean-token-sum")
    loss, _ = jax.jit(losses.policy_loss, static_argnums=4)(
        logps, old, jnp.asarray([-1.0]), mask, config
    )
    np.testing.assert_allclose(loss, 3.0 + 1.0 + 0.8, rtol=1e-6)


def test_what_is_not_finite_under_the_mask_has_no_effect():
    bad = jnp.where(jnp.asarray(M) > 0, -0.5, jnp.nan)

    def loss(logps):
        config = PolicyLoss(kl_coef=0.1)
        return losses.policy_loss(
            logps, bad - 0.1, jnp.ones(8), jnp.asarray(M), config, ref_logps=bad + 0.2
        )[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(bad)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_parts_of_a_batch_add_up():
    values, mask = jnp.asarray(VALUES), jnp.asarray(M)
    for mode, count in (("token-mean", M.sum()), ("sequence-mean-token-mean", 8.0),
                        ("sequence-mean-token-sum", 8.0)):  # fmt: skip
        parts = sum(
            aggregate(values[i : i + 4], mask[i : i + 4], mode, count=jnp.asarray(count))
            for i in (0, 4)
        )
        np.testing.assert_allclose(parts, aggregate(values, mask, mode), rtol=1e-5)


def test_whitening():
    got = np.asarray(whiten(jnp.asarray(VALUES), jnp.asarray(M)))[M > 0]
    np.testing.assert_allclose([got.mean(), got.std(ddof=1)], [0, 1], atol=1e-5)
    alone = whiten(jnp.ones((1, 2)), jnp.asarray([[1.0, 0.0]]))
    assert np.all(np.isfinite(alone)) and not np.any(alone)


def test_the_controller_follows_its_target():
    controller = losses.KLController(jnp.asarray(0.1), target=0.05, horizon=1000)
    np.testing.assert_allclose(controller.update(jnp.asarray(0.2), 100).coef, 0.1 * 1.02, rtol=1e-6)
    np.testing.assert_allclose(
        controller.update(jnp.asarray(0.049), 100).coef, 0.1 * 0.998, rtol=1e-6
    )
    fixed = losses.KLController(jnp.asarray(0.1))
    assert fixed.update(jnp.asarray(9.0), 10) is fixed


def test_smoothed_dpo_is_least_at_the_odds_of_the_labels():
    """Conservative DPO: with labels wrong in a share e, the best margin is logit(1 - e)."""
    config = losses.PreferenceLoss(beta=1.0, label_smoothing=0.2)
    zero = jnp.zeros(1)
    best = jnp.asarray([np.log(0.8 / 0.2)], jnp.float32)
    slope = jax.grad(lambda x: losses.preference_loss(x, zero, zero, zero, config)[0])(best)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_beliefs_are_fitted_to_the_population():
    logits = jnp.asarray([[1.0, 2.0, 0.5, -1.0]])
    ids = jnp.asarray([0, 2])
    p = np.exp(jax.nn.log_softmax(logits))[0, [0, 2]]
    target = jnp.asarray([[0.7, 0.3]])
    expected = 0.7 * np.log(0.7 / p[0]) + 0.3 * np.log(0.3 / p[1])
    np.testing.assert_allclose(losses.belief_loss(logits, ids, target), expected, rtol=1e-6)
    sure = losses.belief_loss(logits, ids, jnp.asarray([[1.0, 0.0]]))
    np.testing.assert_allclose(sure, -np.log(p[0]), rtol=1e-6)
    far = losses.mixture_distance(jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose(far, np.log(2), rtol=1e-6)


def test_samplers_log_probabilities_tell_the_mismatch():
    mask = jnp.asarray(M)
    logps = jnp.full(M.shape, -1.0)
    assert float(losses.mismatch_kl(logps, logps, mask)) == 0.0
    d = 0.1
    np.testing.assert_allclose(
        losses.mismatch_kl(logps + d, logps, mask), np.exp(d) - 1 - d, rtol=1e-4
    )
    gone = jnp.where(jnp.arange(6) == 2, jnp.nan, logps)
    assert np.all(np.isfinite(losses.truncated_importance(logps, gone, mask, "token_mask")))
