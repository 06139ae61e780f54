"""What TRL says of the cases: its own methods, called with stand-ins for trainer and model.

Where a loss or an advantage is written in the midst of a longer method, the lines themselves are
cut out of the installed source and executed: nothing of TRL is written again here. PPO left TRL in
1.13: its lines come from a folder with trl 1.12.0, named in TRL_WITH_PPO.
"""

import inspect
import math
import os
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace as NS

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, nanstd

from tests.align import cases

ACCELERATOR = NS(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1,
    reduce=lambda x, reduction: x, sync_gradients=True, process_index=0,
    pad_across_processes=lambda x, **options: x,
)  # fmt: skip


def excerpt(source, first: str, last: str, scope: dict) -> None:
    """Executes the lines from the one that begins with `first` to before the one with `last`.

    `source` is a text or a function.
    """
    lines = (source if isinstance(source, str) else inspect.getsource(source)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i in range(start + 1, len(lines)) if lines[i].strip().startswith(last))
    exec(textwrap.dedent("\n".join(lines[start:end])), scope)


def tensors(arrays: dict, *leaves: str) -> dict:
    """Torch's copies of the arrays; those named in `leaves` ask for gradients."""
    return {
        name: torch.tensor(array).requires_grad_(name in leaves) for name, array in arrays.items()
    }


def result(loss: torch.Tensor, *leaves: torch.Tensor) -> dict[str, np.ndarray]:
    """The loss and the gradients of the leaves."""
    gradients = torch.autograd.grad(loss, leaves)
    return {
        "loss": np.asarray(loss.item()),
        **{f"grad{i}": g.numpy() for i, g in enumerate(gradients)},
    }


def policy(name: str, arrays: dict) -> dict[str, np.ndarray]:
    case, x = cases.POLICY[name], tensors(arrays, "logps", "entropy")
    B, T = x["mask"].shape
    model = NS(training=True)
    shared = {
        "model": model, "accelerator": ACCELERATOR, "aux_loss_enabled": False,
        "epsilon_low": cases.EPS["epsilon_low"],
        "epsilon_high": case.get("epsilon_high", cases.EPS["epsilon_high"]),
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *a, **k: (x["logps"], x["entropy"], None),
    }  # fmt: skip
    nothing = torch.zeros(B, 1, dtype=torch.long)
    batch = {
        "prompt_ids": nothing, "prompt_mask": nothing,
        "completion_ids": torch.zeros(B, T, dtype=torch.long), "completion_mask": x["mask"],
        "advantages": x["advantages"], "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"],
        "num_items_in_batch": torch.tensor(case.get("num_items", cases.MASK.sum())),
        "sampling_per_token_logps": x["sampler"],
    }  # fmt: skip
    if case["loss_type"] == "rloo":
        batch["old_logps"] = (x["old"] * x["mask"]).sum(1)
        return result(RLOOTrainer._compute_loss(NS(**shared), model, batch), x["logps"])
    if "importance" in case:
        batch["importance_sampling_ratio"] = importance(case["importance"], x)
    trainer = NS(
        **shared, top_entropy_quantile=case.get("top_entropy_quantile", 1.0),
        off_policy_mask_threshold=case.get("off_policy"), beta=case.get("beta", 0.0),
        importance_sampling_level=case.get("level", "token"), loss_type=case["loss_type"],
        use_vllm="importance" in case, vllm_importance_sampling_correction=True,
        max_completion_length=T, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled="entropy_coef" in case, use_adaptive_entropy=False,
        entropy_coef=case.get("entropy_coef", 0.0),
        args=NS(use_bias_correction_kl=case.get("bias_correction", True), delta=case.get("delta"),
                steps_per_generation=1, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
                vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
    )  # fmt: skip
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    loss = GRPOTrainer._compute_loss(trainer, model, batch)
    leaves = (x["logps"], x["entropy"]) if "entropy_coef" in case else (x["logps"],)
    return result(loss, *leaves)


def importance(kind: str, x: dict) -> torch.Tensor:
    trainer = NS(
        use_vllm=True, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=kind,
        vllm_importance_sampling_clip_min=0.8, vllm_importance_sampling_clip_max=1.2,
    )  # fmt: skip
    scope = {
        "self": trainer, "torch": torch, "math": math, "completion_mask": x["mask"],
        "tool_mask": None, "old_per_token_logps": x["old"],
        "sampling_per_token_logps": x["sampler"],
    }  # fmt: skip
    excerpt(
        GRPOTrainer._generate_and_score_completions,
        "mask = completion_mask if tool_mask is None", "# Compute the per-token log prob", scope,
    )  # fmt: skip
    return scope["vllm_importance_sampling_ratio"]


class Model:
    """Gives the log-probabilities of the shifted tokens, whatever it is asked."""

    training = True

    def __init__(self, logps: torch.Tensor, mask: torch.Tensor) -> None:
        zeros = torch.zeros_like(logps)
        hit = torch.zeros(logps.shape, dtype=torch.bool)
        self._output = FusedCausalLMOutput(
            log_probs=logps * mask, entropy=zeros, mean_logits=zeros, is_top1=hit,
            log_sum_sq_probs=zeros, label_mask=mask.bool(),
        )  # fmt: skip

    def __call__(self, **kwargs):
        return self._output


def pairs(x: dict) -> dict:
    """A batch of TRL's whose shifted completion mask is the case's."""
    mask = torch.cat([torch.zeros(len(x["pair_mask"]), 1), x["pair_mask"]], 1).long()
    return {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }  # fmt: skip


def preference(name: str, arrays: dict) -> dict[str, np.ndarray]:
    case = cases.PREFERENCE[name]
    divergence = case.get("divergence", "reverse_kl")
    if divergence == "alpha_divergence":  # TRL takes it in single precision or less
        arrays = {k: v.astype(np.float32) if v.dtype == np.float64 else v
                  for k, v in arrays.items()}  # fmt: skip
    x = tensors(arrays, "pair_logps")
    kind = name.removesuffix("_" + divergence).removesuffix("_length_desensitised")
    model = Model(x["pair_logps"], x["pair_mask"])
    trainer = NS(
        model=model, accelerator=ACCELERATOR, aux_loss_enabled=False, precompute_ref_logps=True,
        f_divergence_type=divergence, f_alpha_divergence_coef=0.5, loss_types=[kind],
        loss_weights=[1.0], beta=0.1, label_smoothing=case.get("label_smoothing", 0.0),
        use_weighting=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1, ld_alpha=case.get("ld_alpha"), args=NS(discopop_tau=0.05),
    )  # fmt: skip
    batch = pairs(x) | {
        "ref_chosen_logps": x["ref_pairs"][:4],
        "ref_rejected_logps": x["ref_pairs"][4:],
    }
    return result(DPOTrainer._compute_loss(trainer, model, batch, False), x["pair_logps"])


def kto(name: str, arrays: dict) -> dict[str, np.ndarray]:
    case, x = cases.KTO[name], tensors(arrays, "pair_logps")
    model = Model(x["pair_logps"], x["pair_mask"])
    kl, ref_kl = (x["ref_kl"], x["kl"]) if case.get("swap_kl") else (x["kl"], x["ref_kl"])
    labels = x["labels"]
    if "labels" in case:
        labels = torch.full_like(labels, case["labels"] == "all")
    trainer = NS(
        model=model, accelerator=ACCELERATOR, aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, beta=0.1,
        calculate_KL=not name.startswith("apo"),
        loss_type="apo_zero_unpaired" if name.startswith("apo") else "kto",
        desirable_weight=case.get("desirable_weight", 1.0),
        undesirable_weight=case.get("undesirable_weight", 1.0),
        _compute_kl_logps=lambda model, batch: kl,
    )  # fmt: skip
    batch = pairs(x) | {"label": labels, "ref_logps": x["ref_pairs"], "ref_KL_logps": ref_kl}
    return result(KTOTrainer._compute_loss(trainer, model, batch, False), x["pair_logps"])


def contrastive(name: str, arrays: dict) -> dict[str, np.ndarray]:
    case, x = cases.CONTRASTIVE[name], tensors(arrays, "means")
    chosen, rejected = x["means"]
    if name == "orpo":
        losses = ORPOTrainer.odds_ratio_loss(
            NS(beta=case["beta"], accelerator=ACCELERATOR), chosen, rejected
        )
        return result(-losses[0].mean(), x["means"])
    trainer = NS(
        alpha=case.get("alpha", 0.0), beta=case["beta"], simpo_gamma=0.5, accelerator=ACCELERATOR,
        loss_type=name.removeprefix("cpo_").partition("_")[0],
        label_smoothing=case.get("label_smoothing", 0.0),
    )  # fmt: skip
    return result(CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean(), x["means"])


def supervised(name: str, arrays: dict) -> dict[str, np.ndarray]:
    if name.startswith("reward"):
        x = tensors(arrays, "scores")
        scope = {
            "torch": torch, "nn": NS(functional=F), "outputs": NS(logits=x["scores"][:, None]),
            "inputs": {"margin": x["advantages"][:4]} if name.endswith("margin") else {},
            "self": NS(args=NS(center_rewards_coefficient=0.01 if "centred" in name else None)),
        }  # fmt: skip
        excerpt(RewardTrainer.compute_loss, "rewards_chosen, rewards_rej", "if mode ==", scope)
        return result(scope["loss"], x["scores"])
    x = tensors(arrays, "logps")
    scope = {
        "torch": torch, "outputs": NS(log_probs=x["logps"] * x["mask"]),
        "self": NS(args=NS(loss_type=name)), "num_items_in_batch": x["mask"].sum(),
    }  # fmt: skip
    excerpt(SFTTrainer.compute_loss, "per_token_loss = -outputs", "if self.aux", scope)
    return result(scope["loss"], x["logps"])


def advantages(name: str, arrays: dict) -> dict[str, np.ndarray]:
    case, x = cases.ADVANTAGES[name], tensors(arrays)
    several = case.get("several", False)
    rewards = x["rewards"] if several else x["rewards"][:, :1]
    trainer = NS(
        reward_weights=x["weights"] if several else x["weights"][:1], beta=case.get("beta", 0.0),
        multi_objective_aggregation="normalize_then_sum" if several else "sum_then_normalize",
        scale_rewards=case.get("scale", "group"), reward_funcs=[None] * rewards.shape[1],
        reward_clip_range=None, normalize_advantages=case.get("normalize", False),
    )  # fmt: skip
    scope = {
        **vars(grpo_trainer), "self": trainer, "rewards_per_func": rewards, "device": "cpu",
        "num_generations": case.get("group", 4), "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"], "completion_mask": x["mask"], "gather": lambda x: x,
        "torch": torch, "nanstd": nanstd,
    }  # fmt: skip
    trainer_class = RLOOTrainer if name.startswith("rloo") else GRPOTrainer
    end = "is_std_zero" if name.startswith("rloo") else "# Slice to keep only"
    excerpt(trainer_class._generate_and_score_completions, "unscorable_mask =", end, scope)
    return {"advantages": scope["advantages"].numpy()}


def ppo(name: str, arrays: dict) -> dict[str, np.ndarray]:
    """Advantages and returns of the rollout, then loss and gradients of one microbatch."""
    file = Path(os.environ["TRL_WITH_PPO"]) / "trl" / "experimental" / "ppo" / "ppo_trainer.py"
    text = file.read_text()
    assert "INVALID_LOGPROB = 1.0" in text
    scope: dict = {"torch": torch, "INVALID_LOGPROB": 1.0}
    excerpt(text, "def masked_mean(", "# taken from", scope)
    train = text[text.index("    def train(self") :]
    x = tensors(arrays, "logps", "new_values")
    settings = {"kl_coef": 0.05, "kl_estimator": "k1", "whiten_rewards": False, "gamma": 1.0,
                "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}  # fmt: skip
    B, T = x["old"].shape
    scope |= {
        "args": NS(**settings | cases.PPO[name]),
        "logprobs": x["old"].clone(), "ref_logprobs": x["ref"], "values": x["values"],
        "scores": x["scores"], "sequence_lengths": x["last"], "responses": torch.zeros(B, T),
        "new_logprobs": x["logps"], "vpred": x["new_values"],
        "micro_batch_inds": torch.arange(B),
    }  # fmt: skip
    excerpt(train, "response_idxs = torch.arange(", "empty_cache()", scope)
    scope |= {"mb_advantage": scope["advantages"], "mb_logprobs": scope["logprobs"],
              "mb_return": scope["returns"], "mb_values": scope["values"]}  # fmt: skip
    excerpt(train, "new_logprobs = torch.masked_fill(", "vpred = vpred_temp", scope)
    excerpt(train, "vpred = torch.masked_fill(", "accelerator.backward", scope)
    found = result(scope["loss"], x["logps"], x["new_values"])
    return found | {"advantages": scope["advantages"].numpy(), "returns": scope["returns"].numpy()}


FAMILIES = {
    "policy": (policy, cases.POLICY), "preference": (preference, cases.PREFERENCE),
    "kto": (kto, cases.KTO), "contrastive": (contrastive, cases.CONTRASTIVE),
    "supervised": (supervised, dict.fromkeys(cases.SUPERVISED)), "ppo": (ppo, cases.PPO),
    "advantages": (advantages, cases.ADVANTAGES),
}  # fmt: skip
