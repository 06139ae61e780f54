"""How far a policy has moved: estimators of KL(policy || reference) from log-probabilities.

All are of one sampled token a position; with d = logp - ref: k1 = d is unbiased and may be
negative, k2 = d^2 / 2 has a small bias and the right gradient, k3 = e^-d - 1 + d is unbiased and
never negative (Schulman, "Approximating KL divergence", 2020).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxinfra.errors import UserError

Estimator = Literal["k1", "abs", "k2", "k3", "k1+", "k3+"]


def estimate_kl(
    logps: Float[Array, "B T"], ref_logps: Float[Array, "B T"], kind: Estimator = "k3"
) -> Float[Array, "B T"]:
    """One number a token, in nats; differentiable in `logps`.

    A "+" is straight-through: the value of the estimator with the gradient of k2, which is that of
    the divergence itself (as verl's `k3+`). The gradient of k1 used as a loss has mean zero: it is
    for rewards alone. verl limits d to +-20 and k3 to +-10, OpenRLHF floors k3's log-ratio at -10;
    here, as in TRL, nothing is limited.
    """
    if kind not in get_args(Estimator):
        raise UserError(f"kl: {kind!r}: choose one of {', '.join(get_args(Estimator))}")
    d = logps - ref_logps
    if kind.endswith("+"):
        square = 0.5 * d**2
        value = estimate_kl(logps, ref_logps, "k1" if kind == "k1+" else "k3")
        return jax.lax.stop_gradient(value - square) + square
    if kind == "k1":
        return d
    if kind == "abs":
        return jnp.abs(d)
    if kind == "k2":
        return 0.5 * d**2
    return jnp.expm1(-d) + d


@struct.dataclass
class KLController:
    """The coefficient of the divergence, kept near a target or fixed (arXiv 1909.08593, 2.2)."""

    coef: Float[Array, ""]
    target: float | None = struct.field(pytree_node=False, default=None)
    horizon: float = struct.field(pytree_node=False, default=10_000.0)

    def update(self, kl: Float[Array, ""], samples: int) -> KLController:
        """After a batch of `samples` whose mean divergence was `kl` nats.

        coef times 1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon; without a target, as is.
        """
        if self.target is None:
            return self
        error = jnp.clip(kl / self.target - 1.0, -0.2, 0.2)
        coef = self.coef * (1.0 + error * samples / self.horizon)
        return KLController(coef, self.target, self.horizon)
