"""One gradient step that is left out where it is not finite: the end of every trainer here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Carry = tuple[Any, Any, jax.Array]  # what is trained, the optimiser's state, steps left out


def guarded_update(
    loss: Callable[[Any, Any], tuple[jax.Array, dict]], tx: optax.GradientTransformation
) -> Callable[[Carry, Any], tuple[Carry, dict]]:
    """`update(carry, batch) -> (carry, metrics)` of `loss(trained, batch) -> (loss, metrics)`.

    Where loss or gradient norm is not finite, parameters and optimiser stay and the third of the
    carry, an int32, is one more. Adds the metric grad_norm (before clipping).
    """

    def update(carry: Carry, batch: Any) -> tuple[Carry, dict]:
        trained, opt_state, skipped = carry
        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(trained, batch)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, new_opt = tx.update(gradient, opt_state, trained)
        new: Any = (optax.apply_updates(trained, updates), new_opt)  # pyright: ignore
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), new, (trained, opt_state)
        )
        skipped = skipped + (~finite).astype(jnp.int32)
        return (trained, opt_state, skipped), metrics | {"grad_norm": norm}

    return update
