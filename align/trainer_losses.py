"""From a batch of rows to each method's loss and TRL's metrics: what one update minimises.

Cost: a forward pass of B k sequences and twice that for the gradient; kto one forward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align.aggregate import sequence_mean, sequence_sum
from align.logprobs import answer_logps, answer_states, answer_tokens, state_logps
from align.losses import (
    contrastive_loss,
    dft_loss,
    gdpo_loss,
    kto_loss,
    length_desensitised,
    nll_loss,
    orpo_loss,
    pairwise_loss,
    preference_loss,
)
from align.packing import Plan, hidden, plan
from align.trainer_config import DPO, GDPO, KTO, ORPO, SFT, Reward, SimPO, TrainerConfig
from align.value_model import ValueModel, sequence_scores
from jaxinfra.generate import Sampling
from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params

Batch = Mapping[str, Any]  # arrays of `align.preferences.rows.Rows`, and "reference" [B, k]
Metrics = dict[str, Float[Array, ""]]
_PLAIN = Sampling(temperature=1.0)


class Objective(NamedTuple):
    """What a method minimises.

    `loss(policy, batch, count)`, for the Params or ValueModel `policy`, where `count` is what
    `counted(batch)` gives: the tokens that a mean over tokens divides by. Over equal parts of a
    batch, the mean of losses is the batch's own when `count` is the mean of the parts' counts; but
    kto's point of reference and aot's order are a part's own, as in TRL.
    `reference(policy, batch)` [B, k] is what the loss wants of the reference, None where nothing.
    """

    loss: Callable[[Any, Batch, Array], tuple[Float[Array, ""], Metrics]]
    counted: Callable[[Batch], Float[Array, ""]]
    reference: Callable[[Params, Batch], Float[Array, "B k"]] | None = None


def make_objective(
    config: TrainerConfig, model: ModelConfig, beliefs: tuple[int, ...] = (), *, rows: int = 0
) -> Objective:
    """The objective of the method that `config` is of; `beliefs` are gdpo's tokens.

    With `rows`, those of `align.preferences.rows.packed_rows`, a forward pass's sequences are
    packed into so many.
    """
    options: dict[str, Any] = {"remat": config.remat, "sure": True}

    def packed(batch: Batch, left_out: int = 1) -> Plan | None:
        """Of all tokens of each sequence but the last, which foretells nothing."""
        if not rows:
            return None
        sizes, S = _flat(batch["sizes"]), batch["tokens"].shape[-1]
        return plan(sizes - left_out, S - left_out, rows)

    def logps(policy: Params, batch: Batch) -> tuple[Array, Array]:
        """Of answers' tokens [B, k, T]: log-probabilities and entropies."""
        tokens, lengths, mask = (_flat(batch[name]) for name in ("tokens", "lengths", "mask"))
        found = answer_logps(
            policy, model, tokens, lengths, mask.shape[1], _PLAIN, packed(batch), **options
        )
        return tuple(a.reshape(batch["mask"].shape) for a in found)  # pyright: ignore

    def sums(policy: Params, batch: Batch) -> Array:
        return _sums(logps(policy, batch)[0], batch["mask"])

    def answers(batch: Batch) -> Array:
        return jnp.sum(batch["mask"][:, 0])

    if isinstance(config, SFT):
        kind = {"nll": nll_loss, "dft": dft_loss}[config.loss]

        def supervised(policy: Params, batch: Batch, count: Array) -> tuple[Array, Metrics]:
            found, entropy = logps(policy, batch)
            mask = batch["mask"][:, 0]
            return kind(found[:, 0], mask, count=count), {
                "entropy": jnp.sum(entropy[:, 0] * mask) / count
            }

        return Objective(supervised, answers)

    if isinstance(config, Reward):

        def reward(policy: ValueModel, batch: Batch, count: Array) -> tuple[Array, Metrics]:
            tokens, sizes = _flat(batch["tokens"]), _flat(batch["sizes"])
            scores = sequence_scores(policy, model, tokens, sizes, packed(batch, 0), **options)
            scores = scores.reshape(-1, 2)
            c, j = scores[:, 0], scores[:, 1]
            loss = pairwise_loss(c, j, margin=batch.get("margin", 0.0), centre=config.centre)
            return loss, {
                "accuracy": jnp.mean((c > j).astype(jnp.float32)), "margin": jnp.mean(c - j),
                "min_reward": jnp.min(scores), "mean_reward": jnp.mean(scores),
                "max_reward": jnp.max(scores),
            }  # fmt: skip

        return Objective(reward, answers)

    if isinstance(config, DPO):

        def desensitised(found: Array, mask: Array) -> Array:
            if config.tail_weight == 1.0:
                return _sums(found, mask)
            c = length_desensitised(found[:, 0], mask[:, 0], mask[:, 1], config.tail_weight)
            j = length_desensitised(found[:, 1], mask[:, 1], mask[:, 0], config.tail_weight)
            return jnp.stack([c, j], axis=1)

        def pairs(policy: Params, batch: Batch, count: Array) -> tuple[Array, Metrics]:
            found, _ = logps(policy, batch)
            mask = batch["mask"]
            n, ours, ref = jnp.sum(mask, axis=2), desensitised(found, mask), batch["reference"]
            loss, metrics = preference_loss(
                ours[:, 0], ours[:, 1], ref[:, 0], ref[:, 1], config.loss,
                chosen_lengths=n[:, 0], rejected_lengths=n[:, 1],
            )  # fmt: skip
            nll = nll_loss(found[:, 0], mask[:, 0], count=count)
            if config.nll_coef:
                loss = loss + config.nll_coef * nll
            return loss, metrics | {"nll_loss": nll} | _of_pairs(ours)

        def reference(policy: Params, batch: Batch) -> Array:
            return desensitised(logps(policy, batch)[0], batch["mask"])

        return Objective(pairs, answers, reference)

    if isinstance(config, KTO):

        def unpaired(policy: Params, batch: Batch, count: Array) -> tuple[Array, Metrics]:
            own, other = (_one(batch, j) for j in (0, 1))
            ours, kl = sums(policy, own)[:, 0], None
            if config.loss == "kto":
                kl = jax.lax.stop_gradient(sums(policy, other)[:, 0])
            ref = batch["reference"]
            loss, metrics = kto_loss(
                ours, ref[:, 0], batch["label"], kl, ref[:, 1], kind=config.loss, beta=config.beta,
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
            )  # fmt: skip
            margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
            good = batch["label"].astype(jnp.float32)
            return loss, metrics | {
                "rewards/margins": margins, "logps/chosen": _mean(ours, good),
                "logps/rejected": _mean(ours, 1.0 - good),
            }  # fmt: skip

        return Objective(unpaired, answers, sums)

    if isinstance(config, ORPO):

        def odds(policy: Params, batch: Batch, count: Array) -> tuple[Array, Metrics]:
            tokens, lengths, sizes = (_flat(batch[n]) for n in ("tokens", "lengths", "sizes"))
            S = tokens.shape[1] - 1
            found, _ = answer_logps(
                policy, model, tokens, jnp.ones_like(lengths), S, _PLAIN, packed(batch), **options
            )
            target = jnp.arange(1, S + 1)
            place = target - lengths[:, None]
            learnt = _flat(batch["mask"])
            inside = jnp.clip(place, 0, learnt.shape[1] - 1)
            mask = jnp.where(place < 0, 0.0, jnp.take_along_axis(learnt, inside, axis=1))
            mask = mask * (target < sizes[:, None]).astype(mask.dtype)
            every = (target < sizes[:, None]).astype(mask.dtype)
            means = sequence_mean(found, mask).reshape(-1, 2)
            nll = nll_loss(found[::2], every[::2], count=count)
            loss, metrics = orpo_loss(means[:, 0], means[:, 1], nll, beta=config.beta)
            rewards = config.beta * jnp.mean(means, axis=0)
            return loss, metrics | {
                "nll_loss": nll, "rewards/chosen": rewards[0], "rewards/rejected": rewards[1],
                "rewards/margins": rewards[0] - rewards[1],
            } | _of_pairs(means)  # fmt: skip

        return Objective(odds, lambda batch: jnp.sum(batch["sizes"][:, 0] - 1).astype(jnp.float32))

    if isinstance(config, SimPO):

        def contrast(policy: Params, batch: Batch, count: Array) -> tuple[Array, Metrics]:
            found, _ = logps(policy, batch)
            mask = batch["mask"]
            ours = _sums(found, mask)
            if config.loss.kind in ("simpo", "ipo"):
                ours = ours / jnp.maximum(jnp.sum(mask, axis=2), 1.0)
            nll = nll_loss(found[:, 0], mask[:, 0], count=count)
            loss, metrics = contrastive_loss(ours[:, 0], ours[:, 1], nll, config.loss)
            rewards = config.loss.beta * jnp.mean(ours, axis=0)
            return loss, metrics | {
                "nll_loss": nll, "rewards/chosen": rewards[0], "rewards/rejected": rewards[1],
            } | _of_pairs(ours)  # fmt: skip

        return Objective(contrast, answers)

    assert isinstance(config, GDPO)
    ids = jnp.asarray(beliefs)

    def beliefs_first(policy: Params, batch: Batch, count: Array) -> tuple[Array, Metrics]:
        tokens, lengths, mask = (_flat(batch[n]) for n in ("tokens", "lengths", "mask"))
        T = mask.shape[1]
        x = hidden(policy, model, tokens[:, :-1], packed(batch), **options)
        states = answer_states(x, lengths - 1, T + 1)
        said = transformer.head(policy, model, states[::2, :1])[:, 0]
        found, _ = state_logps(
            policy, model, states[:, 1:], answer_tokens(tokens, lengths, T), _PLAIN
        )
        ours, ref = sequence_sum(found, mask).reshape(-1, 2), batch["reference"]
        loss, metrics = gdpo_loss(
            ours[:, 0], ours[:, 1], ref[:, 0], ref[:, 1], said, ids, batch["target"],
            batch["belief"], config.loss,
        )  # fmt: skip
        return loss, metrics | _of_pairs(ours)

    return Objective(beliefs_first, answers, sums)


def _flat(a: Array) -> Array:
    return a.reshape(-1, *a.shape[2:])


def _one(batch: Batch, j: int) -> Batch:
    """The batch with the j-th sequence of each row alone."""
    names = ("tokens", "lengths", "sizes", "mask")
    return {name: batch[name][:, j : j + 1] for name in names}


def _sums(logps: Float[Array, "B k T"], mask: Float[Array, "B k T"]) -> Float[Array, "B k"]:
    return sequence_sum(_flat(logps), _flat(mask)).reshape(mask.shape[:2])


def _mean(values: Float[Array, " B"], counted: Float[Array, " B"]) -> Float[Array, ""]:
    return jnp.sum(values * counted) / jnp.maximum(jnp.sum(counted), 1.0)


def _of_pairs(ours: Float[Array, "B 2"]) -> Metrics:
    return {"logps/chosen": jnp.mean(ours[:, 0]), "logps/rejected": jnp.mean(ours[:, 1])}
