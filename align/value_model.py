"""A transformer with one number a token in place of words: PPO's critic, and reward models.

Cost: a forward pass without the language-model head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from align.logprobs import answer_states
from align.packing import Plan, hidden
from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Leaf, Params
from jaxinfra.weights.open import load_weights

_HEAD = "value_head.npz"


@struct.dataclass
class ValueModel:
    """The trunk of a language model and a linear map to one number."""

    trunk: Params
    value: Leaf  # [D]
    value_bias: Leaf  # []

    @classmethod
    def from_policy(cls, params: Params) -> ValueModel:
        """The policy's trunk with a head of zeros: every value is 0 at the start."""
        dtype = params.embed.dtype
        zeros = jnp.zeros((params.embed.shape[1],), dtype)
        return cls(params, zeros, jnp.zeros((), dtype))


def answer_values(
    critic: ValueModel,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    T: int,
    where: Plan | None = None,
    **options,
) -> Float[Array, "B T"]:
    """The value of the state in which each of T answer tokens is chosen, float32.

    `where` and `options` are those of `align.logprobs.answer_logps`.
    """
    x = hidden(critic.trunk, config, tokens[:, :-1], where, **options)
    return _numbers(critic, answer_states(x, lengths, T))


def sequence_scores(
    reward_model: ValueModel,
    config: ModelConfig,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    where: Plan | None = None,
    **options,
) -> Float[Array, " B"]:
    """The number at the last of each row's `lengths` tokens: a reward model's score, float32.

    `where` is of packed rows, of all `lengths` tokens.
    """
    x = hidden(reward_model.trunk, config, tokens, where, **options)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
    return _numbers(reward_model, last)[:, 0]


def save_head(folder: str | Path, reward_model: ValueModel) -> None:
    """Writes the head beside the trunk's files in `folder`: value_head.npz."""
    value, bias = np.asarray(reward_model.value), np.asarray(reward_model.value_bias)
    np.savez(Path(folder) / _HEAD, value=value, value_bias=bias)


def load_reward_model(
    folder: str | Path, dtype: Any = jnp.float32
) -> tuple[ModelConfig, ValueModel]:
    """The reward model in `folder`: a model's files with a head beside them.

    Raises UserError where there is no head or it is of another width.
    """
    folder = Path(folder)
    if not (folder / _HEAD).is_file():
        raise UserError(f"{folder}: no {_HEAD}; give the folder `model` of a reward run")
    config, trunk = load_weights(folder, dtype)
    with np.load(folder / _HEAD) as head:
        value, bias = jnp.asarray(head["value"], dtype), jnp.asarray(head["value_bias"], dtype)
    if value.shape != (config.d_model,):
        raise UserError(f"{folder / _HEAD}: is of {value.shape}, the model of {config.d_model}")
    return config, ValueModel(trunk, value, bias)


def _numbers(critic: ValueModel, x: Array) -> Array:
    y = jnp.einsum("btd,d->bt", x, critic.value, preferred_element_type=jnp.float32)
    return y + critic.value_bias.astype(jnp.float32)
