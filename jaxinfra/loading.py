"""`jaxinfra.load(NAME_OR_PATH)`: the one door from a model's name to something that speaks."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfra.errors import UserError
from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.weights.open import load_weights
from jaxinfra.weights.pull import pull


@dataclasses.dataclass(frozen=True)
class Model:
    """A configuration, its parameters and its tokenizer; call it on tokens for logits."""

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)

    def __call__(self, tokens: Int[Array, "B T"], **options: Any) -> Float[Array, "B T V"]:
        """Float32 logits; `options` are those of `jaxinfra.model.transformer.hidden`.

        Raises UserError for what is not whole numbers [B, T]; ids that are not jax's are also held
        to the vocabulary.
        """
        return _forward(self.params, self.config, self._tokens(tokens), **options)

    def _tokens(self, tokens: Any) -> Array:
        if isinstance(tokens, jax.Array):
            shape, whole = tokens.shape, jnp.issubdtype(tokens.dtype, jnp.integer)
        else:
            try:
                tokens = np.asarray(tokens)
            except ValueError:
                raise UserError("tokens: rows of different lengths; pad them to one") from None
            shape, whole = tokens.shape, np.issubdtype(tokens.dtype, np.integer)
        if len(shape) != 2 or not whole or 0 in shape:
            raise UserError(
                f"tokens: {tokens.dtype}{list(shape)}; give rows of token ids [B, T], such as "
                "model([model.tokenizer.encode(text)])"
            )
        if isinstance(tokens, np.ndarray) and not 0 <= tokens.min() <= tokens.max() < (
            size := self.config.vocab_size
        ):
            raise UserError(f"tokens: ids from {tokens.min()} to {tokens.max()}; {size=}")
        return jnp.asarray(tokens)


def load(
    name: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding: Any = None,
    offline: bool = False,
) -> Model:
    """Loads a model by short name ("smollm2-135m"), Hugging Face id, folder or .gguf file.

    Args:
      dtype: of the parameters on the device.
      sharding: one `jax.sharding.Sharding` for every array, or a tree of them like Params.
      offline: use only what is on this machine.

    Raises UserError with the file and the fix on anything missing, truncated or contradictory.
    """
    path = pull(str(name), offline=offline)
    config, params = load_weights(path, dtype, sharding)
    tokenizer = Tokenizer.from_path(path)
    try:
        tokenizer.check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Model(config, params, tokenizer)


@functools.partial(jax.jit, static_argnames=("config", "remat", "unroll", "implementation"))
def _forward(params, config, tokens, **options):
    return transformer.forward(params, config, tokens, **options)
