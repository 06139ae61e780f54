"""What follows a product before it is rounded and stored: scale, bias, activation, residual.

    out = activation(scale * (a @ b) + bias) + residual        in float32, rounded once

Fused into the product's kernel it costs no traffic but that of its operands.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 64  # columns of gate, then of up, and so on

ACTIVATIONS = {
    "gelu": lambda z: jax.nn.gelu(z, approximate=True),
    "relu": lambda z: jnp.maximum(z, 0),
    "silu": jax.nn.silu,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Epilogue:
    """activation(scale * (a @ b) + bias) + residual; what is None is left out.

    scale is a scalar, bias [N] has one number a column, residual has the output's shape and dtype.
    activation is a key of ACTIVATIONS, or "swiglu": columns are gate and up in turns of 64 (see
    `interleave`), and the output has N / 2 columns, silu(gate) times up.
    """

    scale: Any = None
    bias: Any = None
    activation: str | None = dataclasses.field(default=None, metadata={"static": True})
    residual: Any = None

    def __post_init__(self) -> None:
        if self.activation not in (None, "swiglu", *ACTIVATIONS):
            known = ", ".join((*ACTIVATIONS, "swiglu"))
            raise ValueError(f"Epilogue: activation={self.activation!r}; there are {known}")

    def columns(self, N: int) -> int:
        """Columns of the output of a product with N."""
        return N // 2 if self.activation == "swiglu" else N


def activate(z: Float[Array, "... N"], activation: str | None) -> Float[Array, "... n"]:
    """The activation of whole rows."""
    if activation is None:
        return z
    if activation != "swiglu":
        return ACTIVATIONS[activation](z)
    pairs = z.reshape(*z.shape[:-1], -1, 2, BLOCK)
    out = jax.nn.silu(pairs[..., 0, :]) * pairs[..., 1, :]
    return out.reshape(*z.shape[:-1], z.shape[-1] // 2)


def interleave(
    gate: Float[Array, "... K F"], up: Float[Array, "... K F"]
) -> Float[Array, "... K 2F"]:
    """The matrix whose product "swiglu" reads: 64 columns of gate, 64 of up, and so on.

    Raises ValueError where F is not a multiple of 64 or the shapes differ.
    """
    if gate.shape != up.shape or gate.shape[-1] % BLOCK:
        raise ValueError(
            f"interleave: gate{gate.shape}, up{up.shape}; want one shape, F a multiple of {BLOCK}"
        )
    blocks = [w.reshape(*w.shape[:-1], -1, 1, BLOCK) for w in (gate, up)]
    return jnp.concatenate(blocks, axis=-2).reshape(*gate.shape[:-1], 2 * gate.shape[-1])
