"""The `flax.nnx` face of the model, for users who think in modules.

A `Transformer` holds the very arrays of `Params` as `nnx.Param`s, so nothing is copied and nothing
is written twice: calling it runs `jaxinfra.model.transformer.forward`. `nnx.split`, `nnx.grad`,
`nnx.Optimizer` and the other tools of nnx see ordinary parameters.

    model = Transformer(config, rngs=nnx.Rngs(0))
    logits = model(tokens)                        # [B, T, V]
    params = model.params()                       # back to the tree, the same arrays
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params, abstract, init


class Transformer(nnx.Module):
    """A decoder-only transformer whose state is one `nnx.Param` for every array of `Params`,
    named by its path in the tree ("layers.attn.q")."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: Any = jnp.float32,
    ):
        """Around existing `params`, or around new ones in `dtype` drawn from `rngs`."""
        if (params is None) == (rngs is None):
            raise ValueError("Transformer: give params (to wrap) or rngs (to draw new ones)")
        if params is None:
            assert rngs is not None
            params = init(rngs.params(), config, dtype)
        flat = jax.tree_util.tree_flatten_with_path(params)[0]
        self.config = config
        self.weights = nnx.Dict({_name(path): nnx.Param(leaf) for path, leaf in flat})

    def params(self) -> Params:
        """The parameters as the tree that the rest of jaxinfra takes."""
        paths, tree = jax.tree_util.tree_flatten_with_path(abstract(self.config))
        return jax.tree.unflatten(tree, [self.weights[_name(p)].get_value() for p, _ in paths])

    def __call__(self, tokens: Int[Array, "B T"], **options: Any) -> Float[Array, "B T V"]:
        """Float32 logits; `options` are those of `jaxinfra.model.transformer.hidden`."""
        return transformer.forward(self.params(), self.config, tokens, **options)


def _name(path: tuple) -> str:
    return ".".join(key.name for key in path)
