"""`jaxinfra.load(NAME_OR_PATH)`: the one door from a model's name to something that speaks."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    params: Params
    tokenizer: Tokenizer

    def __call__(self, tokens: Int[Array, "B T"], **options: Any) -> Float[Array, "B T V"]:
        """Float32 logits; `options` are those of `jaxinfra.model.transformer.hidden`."""
        return _forward(self.params, self.config, jnp.asarray(tokens), **options)


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
    gguf = [path] if path.is_file() else list(path.glob("*.gguf"))
    tokenizer = Tokenizer.from_gguf(gguf[0]) if gguf else Tokenizer.from_folder(path)
    tokenizer.check(config)
    return Model(config, params, tokenizer)


@functools.partial(jax.jit, static_argnames=("config", "remat", "unroll", "implementation"))
def _forward(params, config, tokens, **options):
    return transformer.forward(params, config, tokens, **options)
