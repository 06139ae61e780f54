"""What narrow numbers need to train: a scale on the loss, or scales on products; kept in the state.

bfloat16 has float32's range and needs neither. float16 reaches from 6e-8 to 65,504, so small
gradients vanish. The loss is multiplied by a scale before differentiation and the float32
gradients divided by it after all sums (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2):

    a gradient is not finite    the step is skipped, the scale halved
    INTERVAL steps in a row are    the scale doubled

Whether a gradient is finite is asked of its norm over all devices, never of a shard: a shard that
went on alone would part from the others for good. float8's scales are those of `parallel.fp8`.

    python -m jaxinfra train --mesh dp=2,tp=2 --precision float16 --emulate 4
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig

INITIAL = 2.0**15
INTERVAL = 2000
PRECISIONS = ("float16", "float8", "float8-delayed")
HISTORY = 16  # steps whose largest values the delayed scales remember


@struct.dataclass
class LossScale:
    """The factor on the loss, and steps since it last changed."""

    scale: Float[Array, ""]
    clean: Int[Array, ""]

    def after(self, finite: Array) -> LossScale:
        """The scale of the next step."""
        clean = jnp.where(finite, self.clean + 1, 0)
        due = clean == INTERVAL
        grown = jnp.where(due, jnp.minimum(self.scale * 2, 2.0**24), self.scale)
        scale = jnp.where(finite, grown, jnp.maximum(self.scale / 2, 1.0))
        return LossScale(scale, jnp.where(due, 0, clean))


class Scaled(NamedTuple):
    """An optimiser's state with the scales that the next step computes with."""

    loss: LossScale | None
    largest: Array | None  # float32 [L, products, 3, HISTORY], newest first; see `parallel.fp8`
    inner: Any


def scaled(
    optimizer: optax.GradientTransformation, precision: str, config: ModelConfig
) -> optax.GradientTransformation:
    """`optimizer` whose state begins with the scales of a precision; it sees unscaled gradients."""
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
    if precision == "float8":  # scales that are found anew have no state
        return optimizer

    def init(params: Any) -> Any:
        loss = largest = None
        if precision == "float16":
            loss = LossScale(jnp.asarray(INITIAL, jnp.float32), jnp.zeros((), jnp.int32))
        else:
            from parallel.fp8 import PRODUCTS

            shape = (config.num_layers, len(PRODUCTS), 3, HISTORY)
            largest = jnp.zeros(shape, jnp.float32)
        return Scaled(loss, largest, optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, inner = optax.with_extra_args_support(optimizer).update(
            updates, state.inner, params, **extra
        )
        return updates, state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def scales(opt_state: Any) -> tuple[Array | None, Array | None]:
    """(the factor on the loss, largest values of products) of a state that has them."""
    if not isinstance(opt_state, Scaled):
        return None, None
    return None if opt_state.loss is None else opt_state.loss.scale, opt_state.largest


def unscaled(grads: Any, factor: Array | None) -> Any:
    """Gradients of the loss itself."""
    return grads if factor is None else jax.tree.map(lambda g: g / factor, grads)


def after(opt_state: Any, finite: Array, seen: Array | None) -> Any:
    """The state with the scales of the next step; `seen` [L, products, 3] are this step's."""
    if not isinstance(opt_state, Scaled):
        return opt_state
    loss = None if opt_state.loss is None else opt_state.loss.after(finite)
    largest = opt_state.largest
    if largest is not None and seen is not None:
        newer = jnp.concatenate([seen[..., None], largest[..., :-1]], axis=-1)
        largest = jnp.where(finite, newer, largest)
    return opt_state._replace(loss=loss, largest=largest)
