"""Mistakes that are easy to make, each of which the recorded numbers of TRL must reject."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align import advantages as A
from align import losses
from align.aggregate import aggregate, masked_mean, sequence_sum
from align.losses import PolicyLoss
from tests.align.test_losses import error, inputs_of, load

X = {name: jnp.asarray(array) for name, array in inputs_of(load(), np.float32).items()}


def want(name: str) -> np.ndarray:
    return load()[name]


def surrogate(**changes):
    """The tokens' losses of GRPO, with a mistake."""
    r = jnp.exp(X["logps"] - X["old"])
    A_, low, high = X["advantages"][:, None], 0.2, 0.28
    if changes.get("only_high"):
        low = 1.0
    near = jnp.clip(r, 1 - low, 1 + high)
    pick = jnp.maximum if changes.get("sign") else jnp.minimum
    return -pick(r * A_, near * A_)


def kl_sign():
    kl = losses.estimate_kl(X["ref"], X["logps"], "k3")
    return aggregate(surrogate() + 0.04 * kl, X["mask"], "sequence-mean-token-mean")


def kl_of_reward_added():
    kl = losses.estimate_kl(X["old"], X["ref"], "k1")
    return A.leave_one_out(X["rewards"][:, 0] + 0.05 * sequence_sum(kl, X["mask"]), 4)


def baseline_with_itself():
    return A.group_relative(X["rewards"][:, 0], 4, scale="none")


def population_deviation():
    grouped = X["rewards"][:, 0].reshape(-1, 4)
    centred = grouped - jnp.nanmean(grouped, axis=1, keepdims=True)
    return jnp.nan_to_num(centred / (jnp.nanstd(grouped, axis=1, keepdims=True) + 1e-4)).ravel()


def failed_reward_as_zero():
    return A.group_relative(jnp.nan_to_num(X["rewards"][:, 0]), 4)


def normalised_jointly():
    return A.group_relative(jnp.nansum(X["rewards"] * X["weights"], axis=1), 4)


def empty_rows_left_out():
    rows = jnp.sum(X["mask"], axis=1)
    values = jnp.sum(surrogate() * X["mask"], axis=1) / jnp.maximum(rows, 1)
    return jnp.sum(values) / 7.0


def sequence_ratio_summed():
    r = jnp.exp(sequence_sum(X["logps"] - X["old"], X["mask"]))[:, None]
    A_ = X["advantages"][:, None]
    return aggregate(
        -jnp.minimum(r * A_, jnp.clip(r, 0.8, 1.28) * A_), X["mask"], "sequence-mean-token-mean"
    )


def padding_in_the_mean():
    return jnp.mean(surrogate() * X["mask"])


def reference_point_below_zero():
    z = jnp.mean(X["ref_kl"] - X["kl"])
    rho = sequence_sum(X["pair_logps"], X["pair_mask"]) - X["ref_pairs"]
    each = jnp.where(
        X["labels"], 1 - jax.nn.sigmoid(0.1 * (rho - z)), jax.nn.sigmoid(0.1 * (rho - z))
    )
    return jnp.mean(each)  # fmt: skip


def odds_without_denominator():
    return -0.1 * jnp.mean(jax.nn.log_sigmoid(X["means"][0] - X["means"][1]))


def margin_not_divided():
    u = X["means"][0] - X["means"][1]
    return jnp.mean(-jax.nn.log_sigmoid(2.0 * (u - 0.5)))


def ipo_of_sums():
    sums = sequence_sum(X["pair_logps"], X["pair_mask"]) - X["ref_pairs"]
    return jnp.mean((sums[:4] - sums[4:] - 5.0) ** 2)


def cispo_with_a_gradient():
    def loss(logps):
        weight = jnp.minimum(jnp.exp(logps - X["old"]), 1.1)
        return masked_mean(-weight * X["advantages"][:, None] * logps, X["mask"])

    return jax.grad(loss)(X["logps"])


WRONG = [
    (kl_sign, "policy.grpo_kl.loss"),
    (kl_of_reward_added, "advantages.rloo_kl.advantages"),
    (baseline_with_itself, "advantages.rloo.advantages"),
    (population_deviation, "advantages.group.advantages"),
    (failed_reward_as_zero, "advantages.group.advantages"),
    (normalised_jointly, "advantages.decoupled.advantages"),
    (lambda: aggregate(surrogate(sign=True), X["mask"], "token-mean"), "policy.dapo.loss"),
    (lambda: aggregate(surrogate(only_high=True), X["mask"], "token-mean"), "policy.dapo.loss"),
    (lambda: aggregate(surrogate(), X["mask"], "token-mean"), "policy.grpo.loss"),
    (empty_rows_left_out, "policy.grpo.loss"),
    (sequence_ratio_summed, "policy.gspo.loss"),
    (padding_in_the_mean, "policy.bnpo.loss"),
    (reference_point_below_zero, "kto.kto_negative_reference_point.loss"),
    (odds_without_denominator, "contrastive.orpo.loss"),
    (margin_not_divided, "contrastive.simpo.loss"),
    (ipo_of_sums, "preference.ipo.loss"),
    (cispo_with_a_gradient, "policy.cispo.grad0"),
]


def test_the_parts_of_the_mistakes_are_right():
    """Without its mistake each of these is what TRL gives, so the mistake is what is caught."""
    assert error(aggregate(surrogate(), X["mask"], "token-mean"), want("policy.dapo.loss")) < 1e-6
    right = A.leave_one_out(X["rewards"][:, 0], 4)
    assert error(right, want("advantages.rloo.advantages")) < 1e-6


@pytest.mark.parametrize(
    ("mistake", "name"), WRONG, ids=[f"{i}-{n}" for i, (_, n) in enumerate(WRONG)]
)
def test_is_rejected(mistake, name):
    assert error(np.asarray(jax.jit(mistake)()), want(name)) > 1e-4  # the tolerance is 1e-6


def test_configs_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match="dual_clip"):
        PolicyLoss(dual_clip=0.5)
    with pytest.raises(ValueError, match="exo_pair needs label_smoothing"):
        losses.PreferenceLoss("exo_pair")
    with pytest.raises(ValueError, match="needs ref_logps"):
        losses.policy_loss(
            X["logps"], X["old"], X["advantages"], X["mask"], PolicyLoss(kl_coef=1.0)
        )
    with pytest.raises(ValueError, match="whole groups of 3"):
        A.group_relative(X["scores"], 3)
    with pytest.raises(ValueError, match="divides by `length`"):
        aggregate(X["logps"], X["mask"], "sequence-mean-token-sum-norm")
