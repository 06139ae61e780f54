"""From one number a token to one number a batch: the named modes, and means under a mask.

The mode decides what a token weighs: under "token-mean" a long answer weighs more than a short one,
under "sequence-mean-token-mean" each answer weighs the same and its tokens share that weight. The
names are verl's (`agg_loss`, with seq spelled out). Cost: one pass over [B, T].
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfra.errors import UserError

Mode = Literal[
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-sum",
    "sequence-mean-token-sum-norm",
]


def aggregate(
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    mode: Mode,
    *,
    length: int | None = None,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """One number of the values under the mask.

    With v the values, m the mask and T_i = sum_t m_it:

    - "token-mean": sum(v m) / max(sum(m), 1). DAPO (arXiv 2503.14476, equation 8), BNPO, PPO.
    - "sequence-mean-token-mean": mean_i(sum_t v m / max(T_i, 1)). GRPO (arXiv 2402.03300).
    - "sequence-mean-token-sum": mean_i(sum_t v m). LUSPO, and REINFORCE as it is written.
    - "sequence-mean-token-sum-norm": mean_i(sum_t v m / length). Dr. GRPO (arXiv 2503.20783).

    A row without tokens counts as 0 in the means over sequences, as in TRL; verl, OpenRLHF and
    Tunix leave such rows out. verl adds 1e-8 to T_i where TRL takes max(T_i, 1).

    Args:
      values: one number a token; [B, 1] stands for all tokens of a row. What is not finite where
        the mask is 0 has no effect, on the gradient neither.
      mask: 1 where a token counts, else 0; a column of any side may be padding.
      length: tokens a row may have at most, for the mode that ends in "norm".
      count: divide by this in place of the number of tokens ("token-mean") or of rows (the others):
        that of the whole batch, where these rows are a part of it.
    """
    if mode not in get_args(Mode):
        raise UserError(f"aggregate: mode={mode!r}: choose one of {', '.join(get_args(Mode))}")
    if mode == "sequence-mean-token-sum-norm" and length is None:
        raise UserError(f"aggregate: {mode} divides by `length`: give the most tokens of a row")
    kept = jnp.where(mask > 0, values, 0.0) * mask
    if mode == "token-mean":
        count = jnp.sum(mask) if count is None else count
        return jnp.sum(kept) / jnp.maximum(count, 1.0)
    rows = jnp.sum(kept, axis=1)
    if mode == "sequence-mean-token-mean":
        rows = rows / jnp.maximum(jnp.sum(mask, axis=1), 1.0)
    elif mode == "sequence-mean-token-sum-norm":
        rows = rows / float(length or 1)
    return jnp.sum(rows) / (float(mask.shape[0]) if count is None else count)


def masked_mean(values: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, ""]:
    """The mean of all values under the mask; 0 where it is empty (TRL: nan)."""
    return aggregate(values, mask, "token-mean")


def whiten(
    values: Float[Array, "B T"], mask: Float[Array, "B T"], *, shift: bool = True
) -> Float[Array, "B T"]:
    """Values under the mask with mean 0 and variance 1; 0 elsewhere.

    (v - mean) / sqrt(var + 1e-8), var with n - 1 (Bessel), as TRL's and verl's `masked_whiten`;
    OpenRLHF divides by n and takes max(var, 1e-8). One value alone becomes 0.

    Args:
      shift: False keeps the mean: whitened values plus the old mean.
    """
    n = jnp.sum(mask)
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask) * n / jnp.maximum(n - 1.0, 1.0)
    white = (values - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask > 0, white if shift else white + mean, 0.0)


def sequence_sum(values: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, " B"]:
    """The sum of each row under the mask: a sequence's log-probability from its tokens'."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0) * mask, axis=1)


def sequence_mean(values: Float[Array, "B T"], mask: Float[Array, "B T"]) -> Float[Array, " B"]:
    """The mean of each row under the mask; 0 for a row without tokens."""
    return sequence_sum(values, mask) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)
