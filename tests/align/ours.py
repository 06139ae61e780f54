"""Our side of the cases that are held to TRL: the same names, the same inputs, our functions."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from align import advantages as A
from align import losses
from align.aggregate import sequence_sum, whiten
from align.losses import PolicyLoss, PreferenceLoss
from tests.align import cases

SURROGATES = {
    "grpo": {},
    "bnpo": {"aggregation": "token-mean"},
    "dr_grpo": {"aggregation": "sequence-mean-token-sum-norm"},
    "dapo": {"aggregation": "token-mean"},
    "luspo": {"aggregation": "sequence-mean-token-sum"},
    "cispo": {"surrogate": "cispo", "aggregation": "token-mean"},
    "sapo": {"surrogate": "sapo"},
    "vespo": {"surrogate": "vespo", "aggregation": "token-mean"},
}


def policy_config(case: dict) -> PolicyLoss:
    return PolicyLoss(
        **SURROGATES[case["loss_type"]],
        ratio=case.get("level", "token"),
        clip_low=cases.EPS["epsilon_low"],
        clip_high=case.get("epsilon_high", cases.EPS["epsilon_high"]),
        delta=case.get("delta"),
        kl_coef=case.get("beta", 0.0),
        kl_ratio=case.get("bias_correction", True),
        entropy_coef=case.get("entropy_coef", 0.0),
    )


def policy(name: str, x: dict) -> dict:
    case = cases.POLICY[name]
    old, mask, advantages = x["old"], x["mask"], x["advantages"]

    def loss(logps, entropy):
        if case["loss_type"] == "rloo":
            clips = {"clip_low": cases.EPS["epsilon_low"], "clip_high": cases.EPS["epsilon_high"]}
            return losses.rloo_loss(logps, old, advantages, mask, **clips)[0]
        weights = None
        if "off_policy" in case:
            weights = losses.off_policy_mask(
                logps, x["sampler"], advantages, mask, case["off_policy"]
            )
        elif "top_entropy_quantile" in case:
            weights = losses.high_entropy(entropy, mask, case["top_entropy_quantile"])
        elif "importance" in case:
            weights = losses.truncated_importance(
                old, x["sampler"], mask, case["importance"], low=0.8, high=1.2
            )
        return losses.policy_loss(
            logps, old, advantages, mask, policy_config(case), ref_logps=x["ref"], entropy=entropy,
            weights=weights, length=mask.shape[1],
            count=jnp.asarray(case["num_items"]) if "num_items" in case else None,
        )[0]  # fmt: skip

    value, gradients = jax.value_and_grad(loss, (0, 1))(x["logps"], x["entropy"])
    found = {"loss": value, "grad0": gradients[0]}
    return found | {"grad1": gradients[1]} if "entropy_coef" in case else found


def preference(name: str, x: dict) -> dict:
    case, mask = cases.PREFERENCE[name], x["pair_mask"]
    divergence = case.get("divergence", "reverse_kl")
    config = PreferenceLoss(
        kind=name.removesuffix("_" + divergence).removesuffix("_length_desensitised"),
        label_smoothing=case.get("label_smoothing", 0.0), divergence=divergence,
    )  # fmt: skip
    n = jnp.sum(mask, axis=1)

    def loss(logps):
        sums = sequence_sum(logps, mask)
        if "ld_alpha" in case:
            other = jnp.roll(mask, 4, axis=0)
            sums = losses.length_desensitised(logps, mask, other, case["ld_alpha"])
        return losses.preference_loss(
            sums[:4], sums[4:], x["ref_pairs"][:4], x["ref_pairs"][4:], config,
            chosen_lengths=n[:4], rejected_lengths=n[4:],
        )[0]  # fmt: skip

    value, gradient = jax.value_and_grad(loss)(x["pair_logps"])
    return {"loss": value, "grad0": gradient}


def kto(name: str, x: dict) -> dict:
    case = cases.KTO[name]
    kl, ref_kl = (x["ref_kl"], x["kl"]) if case.get("swap_kl") else (x["kl"], x["ref_kl"])
    labels = x["labels"]
    if "labels" in case:
        labels = jnp.full_like(labels, case["labels"] == "all")

    def loss(logps):
        return losses.kto_loss(
            sequence_sum(logps, x["pair_mask"]), x["ref_pairs"], labels, kl, ref_kl,
            kind="apo_zero_unpaired" if name.startswith("apo") else "kto",
            desirable_weight=case.get("desirable_weight", 1.0),
            undesirable_weight=case.get("undesirable_weight", 1.0),
        )[0]  # fmt: skip

    value, gradient = jax.value_and_grad(loss)(x["pair_logps"])
    return {"loss": value, "grad0": gradient}


def contrastive(name: str, x: dict) -> dict:
    case = cases.CONTRASTIVE[name]

    def loss(means):
        if name == "orpo":
            return losses.orpo_loss(means[0], means[1], jnp.zeros((), means.dtype), **case)[0]
        kind = name.removeprefix("cpo_").partition("_")[0]
        config = losses.ContrastiveLoss(kind=kind, **case)  # pyright: ignore
        return losses.contrastive_loss(means[0], means[1], config=config)[0]

    value, gradient = jax.value_and_grad(loss)(x["means"])
    return {"loss": value, "grad0": gradient}


def supervised(name: str, x: dict) -> dict:
    def loss(leaf):
        if name == "nll":
            return losses.nll_loss(leaf, x["mask"])
        if name == "dft":
            return losses.dft_loss(leaf, x["mask"])
        return losses.pairwise_loss(
            leaf[:4], leaf[4:], margin=x["advantages"][:4] if name.endswith("margin") else 0.0,
            centre=0.01 if name.endswith("centred") else 0.0,
        )  # fmt: skip

    value, gradient = jax.value_and_grad(loss)(x["scores" if name.startswith("rew") else "logps"])
    return {"loss": value, "grad0": gradient}


def advantages(name: str, x: dict) -> dict:
    case = cases.ADVANTAGES[name]
    group, rewards = case.get("group", 4), x["rewards"][:, 0]
    if case.get("several"):
        return {"advantages": A.decoupled(x["rewards"], group, x["weights"])}
    if not name.startswith("rloo"):
        return {"advantages": A.group_relative(rewards, group, scale=case.get("scale", "group"))}
    kl = losses.estimate_kl(x["old"], x["ref"], "k1")
    rewards = rewards - case.get("beta", 0.0) * sequence_sum(kl, x["mask"])
    standardize = case.get("normalize", False)
    return {"advantages": A.leave_one_out(rewards, group, standardize=standardize)}


def ppo(name: str, x: dict) -> dict:
    """TRL's PPO from our parts: its score and its values reach one token past the last."""
    case, T = cases.PPO[name], x["mask"].shape[1]
    column = jnp.arange(T)[None]
    mask = (column <= x["last"][:, None]).astype(x["old"].dtype)
    longer = (column <= x["last"][:, None] + 1).astype(x["old"].dtype)
    kl = losses.estimate_kl(x["old"], x["ref"], case.get("kl_estimator", "k1")) * mask
    rewards = A.at_last_token(x["scores"], longer) - 0.05 * kl
    if case.get("whiten_rewards"):
        rewards = whiten(rewards, longer, shift=False)
    values = x["values"] * longer
    raw, returns = A.gae(
        rewards, values, longer, gamma=case.get("gamma", 1.0), lam=case.get("lam", 0.95)
    )
    white = whiten(raw, mask)

    def loss(logps, new_values):
        policy, _ = losses.policy_loss(logps, x["old"], white, mask, losses.PPO)
        return policy + 0.1 * losses.value_loss(new_values, values, returns, longer)[0]

    value, gradients = jax.value_and_grad(loss, (0, 1))(x["logps"], x["new_values"])
    return {"loss": value, "grad0": gradients[0], "grad1": gradients[1], "advantages": white,
            "returns": returns}  # fmt: skip


FAMILIES = {
    "policy": policy, "preference": preference, "kto": kto, "contrastive": contrastive,
    "supervised": supervised, "ppo": ppo, "advantages": advantages,
}  # fmt: skip


def run(family: str, names: Iterable[str], inputs: dict[str, np.ndarray]) -> dict[str, dict]:
    """Losses, gradients and advantages of a family's cases, by name, in the inputs' precision.

    One program for all: what is slow here is compilation.
    """

    def all_of(x):
        return {name: FAMILIES[family](name, x) for name in names}

    return jax.tree.map(np.asarray, jax.jit(all_of)(jax.tree.map(jnp.asarray, inputs)))
