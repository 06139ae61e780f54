"""Inputs and names of the cases that are held to TRL; numpy alone, so that TRL's side needs no jax.

Masks have a full row, padding left, right and on both sides, a hole (a tool's words), one token and
none. Advantages have both signs and zero; ratios leave the clip on both sides.
"""

import numpy as np

EPS = {"epsilon_low": 0.2, "epsilon_high": 0.28}

# name: what the oracle is told, in TRL's own words; "ours" is read by tests.align.ours.
POLICY = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "dapo_part_of_a_batch": {"loss_type": "dapo", "num_items": 40.0},
    "gspo": {"loss_type": "grpo", "level": "sequence"},
    "luspo": {"loss_type": "luspo", "level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "dapo_delta": {"loss_type": "dapo", "delta": 1.25},
    "grpo_kl": {"loss_type": "grpo", "beta": 0.04, "bias_correction": False},
    "grpo_kl_corrected": {"loss_type": "grpo", "beta": 0.04, "bias_correction": True},
    "gspo_kl_corrected": {"loss_type": "grpo", "level": "sequence", "beta": 0.04,
                          "bias_correction": True},
    "dr_grpo_kl": {"loss_type": "dr_grpo", "beta": 0.1, "bias_correction": True},
    "grpo_entropy": {"loss_type": "grpo", "entropy_coef": 0.01},
    "dapo_high_entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.4},
    "grpo_off_policy_mask": {"loss_type": "grpo", "off_policy": 0.05},
    "grpo_token_truncate": {"loss_type": "grpo", "importance": "token_truncate"},
    "dapo_token_mask": {"loss_type": "dapo", "importance": "token_mask"},
    "dapo_sequence_truncate": {"loss_type": "dapo", "importance": "sequence_truncate"},
    "grpo_sequence_mask": {"loss_type": "grpo", "importance": "sequence_mask"},
    "vespo_token_truncate": {"loss_type": "vespo", "importance": "token_truncate"},
    "rloo": {"loss_type": "rloo"},
}  # fmt: skip

_SMOOTH = {"label_smoothing": 0.1}
PREFERENCE = {
    **{kind: {} for kind in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair",
                             "sppo_hard", "apo_zero", "apo_down", "discopop")},
    **{kind: _SMOOTH for kind in ("robust", "exo_pair", "aot", "aot_unpaired")},
    "sigmoid_forward_kl": {"divergence": "forward_kl"},
    "sigmoid_js_divergence": {"divergence": "js_divergence"},
    "sigmoid_alpha_divergence": {"divergence": "alpha_divergence"},
    "ipo_js_divergence": {"divergence": "js_divergence"},
    "robust_forward_kl": {"divergence": "forward_kl", **_SMOOTH},
    "sigmoid_length_desensitised": {"ld_alpha": 0.4},
}  # fmt: skip

KTO = {
    "kto": {},
    "kto_weighted": {"desirable_weight": 1.3, "undesirable_weight": 0.7},
    "kto_all_desirable": {"labels": "all"},
    "kto_all_undesirable": {"labels": "none"},
    "kto_negative_reference_point": {"swap_kl": True},
    "apo_zero_unpaired": {},
}

CONTRASTIVE = {
    "simpo": {"beta": 2.0},
    "simpo_smoothed": {"beta": 2.0, "label_smoothing": 0.1},
    "simpo_alpha": {"beta": 2.0, "alpha": 0.25},
    "cpo_sigmoid": {"beta": 0.1},
    "cpo_hinge": {"beta": 0.1},
    "cpo_ipo": {"beta": 0.1},
    "orpo": {"beta": 0.1},
}

SUPERVISED = ("dft", "nll", "reward", "reward_centred", "reward_margin")

PPO = {
    "ppo": {},
    "ppo_k3": {"kl_estimator": "k3"},
    "ppo_whiten_rewards": {"whiten_rewards": True},
    "ppo_discounted": {"gamma": 0.97, "lam": 0.9},
}

ADVANTAGES = {
    "group": {},
    "batch": {"scale": "batch"},
    "none": {"scale": "none"},
    "group_of_one": {"group": 1},
    "decoupled": {"several": True},
    "decoupled_group_of_one": {"several": True, "group": 1},
    "rloo": {},
    "rloo_standardized": {"normalize": True},
    "rloo_group_of_one": {"group": 1},
    "rloo_kl": {"beta": 0.05},
}

MASK = np.array([
    [1, 1, 1, 1, 1, 1],
    [0, 0, 1, 1, 1, 1],
    [1, 1, 1, 0, 0, 0],
    [0, 1, 1, 1, 0, 0],
    [1, 1, 0, 0, 1, 1],
    [0, 0, 0, 0, 0, 0],
    [0, 0, 1, 0, 0, 0],
    [1, 1, 1, 1, 0, 0],
], np.float64)  # fmt: skip


def inputs() -> dict[str, np.ndarray]:
    """Every array of every case, float64; B = 8, T = 6, four samples a prompt."""
    rng = np.random.default_rng(20)
    B, T = MASK.shape
    logps = -rng.exponential(1.0, (B, T))
    old = logps + rng.normal(0, 0.3, (B, T))
    rewards = rng.normal(0, 1, (B, 3))
    rewards[4:, 0] = 0.5  # one reward does not vary in the second group
    rewards[1, 2] = np.nan
    rewards[6] = np.nan
    sums = -rng.exponential(2.0, (4, 4))
    pair_logps = -rng.exponential(0.7, (8, T))
    return {
        "logps": logps,
        "old": old,
        "ref": logps + rng.normal(0, 0.4, (B, T)),
        "sampler": old + rng.normal(0, 0.2, (B, T)),
        "entropy": rng.uniform(0.1, 3.0, (B, T)),
        "mask": MASK,
        "advantages": np.array([1.2, -0.7, 0.4, -1.5, 0.9, 1.0, -0.3, 0.0]),
        "rewards": rewards,
        "weights": np.array([1.0, 0.5, 2.0]),
        "pair_logps": pair_logps,
        "pair_mask": MASK[[0, 2, 7, 6, 2, 6, 0, 7]],
        "ref_pairs": sums[:2].reshape(-1)[:8],
        "kl": sums[2:].reshape(-1)[:8],
        "ref_kl": sums[2:].reshape(-1)[:8] - rng.uniform(0, 0.6, 8),
        "labels": np.array([1, 0, 1, 1, 0, 0, 1, 0], bool),
        "means": -rng.exponential(1.0, (2, 6)),
        "scores": rng.normal(0, 1, 8),
        "values": rng.normal(0, 1, (B, T)),
        "new_values": rng.normal(0, 1, (B, T)),
        "last": np.array([5, 3, 2, 0, 4, 1, 5, 3]),
    }
