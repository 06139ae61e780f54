"""What an action was worth beyond expectation: group baselines, leave-one-out, GAE, whitening.

Rows of a group stand side by side: with G samples a prompt, rows 0 ... G-1 answer the first one. A
reward that is nan could not be had (a scorer failed): it is outside every baseline, and its row's
advantage is 0. Cost: a few passes over [B] or [B, T]; GAE is a scan of T steps.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from align.aggregate import whiten
from jaxinfra.errors import UserError

Scale = Literal["group", "batch", "none"]


def group_relative(
    rewards: Float[Array, " B"], group_size: int, *, scale: Scale = "group", eps: float = 1e-4
) -> Float[Array, " B"]:
    """GRPO: A = (R - mean of the group) / (its standard deviation + eps).

    arXiv 2402.03300, section 4.1.2. The deviation has n - 1 and `eps` is 1e-4, as in TRL; verl and
    Tunix add 1e-6, OpenRLHF 1e-9. `scale` "batch" divides by the deviation of all rewards
    (the group's mean stays), "none" by nothing (Dr. GRPO, arXiv 2503.20783). A group of one, or one
    with one valid reward, gives 0; verl takes its mean for 0 and its deviation for 1.
    """
    grouped = _grouped(rewards, group_size)
    centred = grouped - _mean(grouped)
    if scale == "group":
        centred = centred / (_deviation(grouped) + eps)
    elif scale == "batch":
        centred = centred / (_deviation(grouped.reshape(1, -1)) + eps)
    elif scale != "none":
        raise UserError(f"advantages: scale={scale!r}: choose group, batch or none")
    return _valid(centred).reshape(-1)


def leave_one_out(
    rewards: Float[Array, " B"], group_size: int, *, standardize: bool = False, eps: float = 1e-4
) -> Float[Array, " B"]:
    """RLOO: A_i = R_i - mean of the others in the group (arXiv 2402.14740, equation 8).

    The baseline leaves R_i out, so it is independent of the action and the estimate unbiased; it
    equals n / (n - 1) (R_i - mean), which is how verl writes it. A group of one gives 0. TRL's
    trainer takes beta times the summed k1 divergence from R first. `standardize` brings the batch's
    valid advantages to mean 0 and deviation 1 (n - 1, + eps): TRL's `normalize_advantages`.
    """
    grouped = _grouped(rewards, group_size)
    valid = ~jnp.isnan(grouped)
    n = jnp.sum(valid, axis=1, keepdims=True).astype(grouped.dtype)
    total = jnp.sum(jnp.where(valid, grouped, 0.0), axis=1, keepdims=True)
    others = (total - grouped) / jnp.maximum(n - 1.0, 1.0)
    apart = jnp.where(valid & (n > 1.0), grouped - others, jnp.nan).reshape(-1)
    return _standardized(apart, eps) if standardize else _valid(apart)


def decoupled(
    rewards: Float[Array, "B R"],
    group_size: int,
    weights: Float[Array, " R"],
    *,
    eps: float = 1e-4,
) -> Float[Array, " B"]:
    """Group reward-Decoupled normalisation (GDPO, arXiv 2601.05242): each of R rewards apart.

    A_k = (r_k - mean of the group) / (its deviation + eps); S = sum_k w_k A_k;
    A = (S - mean of the batch) / (deviation of the batch + eps). Normalising the sum of rewards, as
    GRPO does, lets rewards of a larger spread drown the others. TRL's
    `multi_objective_aggregation="normalize_then_sum"`; verl whitens over tokens in the last step.
    A reward that is nan is left out of S; a row without any is worth 0.
    """
    grouped = rewards.reshape(-1, group_size, rewards.shape[1])
    columns = jnp.moveaxis(grouped, 1, 2)
    apart = (columns - _mean(columns)) / (_deviation(columns) + eps)
    apart = jnp.moveaxis(apart, 2, 1).reshape(rewards.shape)
    total = jnp.sum(jnp.where(jnp.isnan(apart), 0.0, apart * weights), axis=1)
    return _standardized(jnp.where(jnp.all(jnp.isnan(rewards), axis=1), jnp.nan, total), eps)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16): advantages, returns.

    delta_t = R_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V. Where
    the mask is 0 the recursion carries the next value and advantage on (a tool's words between the
    model's own), as in verl; both results are 0 there. TRL runs through padding with values of 0,
    which is the same where padding is at the end. verl's default is lam = 1, TRL's 0.95.
    """

    def step(carry: tuple[Array, Array], column: tuple) -> tuple[tuple[Array, Array], Array]:
        following, advantage = carry
        reward, value, seen = column
        new = reward + gamma * following - value + gamma * lam * advantage
        carry = (jnp.where(seen > 0, value, following), jnp.where(seen > 0, new, advantage))
        return carry, jnp.where(seen > 0, new, 0.0)

    zero = jnp.zeros_like(values[:, 0])
    columns = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(step, (zero, zero), columns, reverse=True)
    return advantages.T, jnp.where(mask > 0, advantages.T + values, 0.0)


def discounted(
    rewards: Float[Array, "B T"], mask: Float[Array, "B T"], *, gamma: float = 1.0
) -> Float[Array, "B T"]:
    """Returns-to-go of tokens: R_t + gamma R_{t+1} + ..., tokens outside the mask passed over."""
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def reinforce_pp(
    rewards: Float[Array, "B T"], mask: Float[Array, "B T"], *, gamma: float = 1.0
) -> Float[Array, "B T"]:
    """REINFORCE++ (arXiv 2501.03262): returns-to-go, whitened over all tokens of the batch.

    `rewards` holds each token's divergence penalty and, at the last one, the score. As in verl.
    """
    return whiten(discounted(rewards, mask, gamma=gamma), mask)


def reinforce_pp_baseline(
    rewards: Float[Array, " B"], mask: Float[Array, "B T"], group_size: int
) -> Float[Array, "B T"]:
    """REINFORCE++ with a baseline: R minus the group's mean, to every token, then whitened.

    arXiv 2501.03262, section 3; verl's `reinforce_plus_plus_baseline`.
    """
    centred = group_relative(rewards, group_size, scale="none")
    return whiten(jnp.broadcast_to(centred[:, None], mask.shape), mask)


def at_last_token(rewards: Float[Array, " B"], mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """A sequence's reward as one of its last token; an empty row gets none; nan counts as 0."""
    T = mask.shape[1]
    last = T - 1 - jnp.argmax(mask[:, ::-1] > 0, axis=1)
    here = (jnp.arange(T)[None] == last[:, None]) & (mask > 0)
    return jnp.where(here, jnp.nan_to_num(rewards)[:, None], 0.0)


def overlong_penalty(lengths: Float[Array, " B"], longest: int, cushion: int) -> Float[Array, " B"]:
    """DAPO's soft punishment (arXiv 2503.14476, equation 13), to be added to rewards, in [-1, 0].

    0 up to `longest - cushion` tokens, then a line down to -1 at `longest`. Lengths are tokens:
    Tunix counts characters here.
    """
    return jnp.clip((longest - cushion - lengths) / float(cushion), -1.0, 0.0)


def informative(rewards: Float[Array, " B"], group_size: int) -> Bool[Array, " B"]:
    """Rows whose group has two valid rewards that differ: DAPO keeps these and refills the batch.

    arXiv 2503.14476, section 3.2 (dynamic sampling). TRL only counts them.
    """
    grouped = _grouped(rewards, group_size)
    high = jnp.max(jnp.where(jnp.isnan(grouped), -jnp.inf, grouped), axis=1)
    low = jnp.min(jnp.where(jnp.isnan(grouped), jnp.inf, grouped), axis=1)
    return jnp.repeat(high > low, group_size)


def _grouped(rewards: Array, group_size: int) -> Float[Array, "P G"]:
    if group_size < 1 or rewards.shape[0] % group_size:
        raise UserError(
            f"advantages: {rewards.shape[0]} rewards are not whole groups of {group_size}"
        )
    return rewards.reshape(-1, group_size)


def _mean(values: Array) -> Array:
    return jnp.nanmean(values, axis=-1, keepdims=True)


def _deviation(values: Array) -> Array:
    """With n - 1; nan where fewer than two are valid, which makes the advantage 0."""
    if values.shape[-1] == 1:
        return jnp.full_like(values, jnp.nan)
    return jnp.nanstd(values, axis=-1, keepdims=True, ddof=1)


def _standardized(values: Array, eps: float) -> Array:
    """(v - mean) / (deviation + eps) over what is not nan; 0 for the rest."""
    row = values[None]
    return _valid((row - _mean(row)) / (_deviation(row) + eps))[0]


def _valid(values: Array) -> Array:
    return jnp.where(jnp.isnan(values), 0.0, values)
