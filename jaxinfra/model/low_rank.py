"""A matrix with a low-rank addition that is not multiplied out: x W + scale (x A) B.

`product` stands wherever the transformer multiplies by a matrix of a layer, so an adapter (LoRA,
arXiv 2106.09685, section 4.1) is a leaf of `Params` like any other, and the scan over layers cuts
it with the rest. Cost beside x W: 2 r (in + out) FLOPs a token in place of 2 in out; where W is not
differentiated, the backward pass makes no gradient of its size.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array


@struct.dataclass
class LowRank:
    """W with its addition; leading axes (layers) are the same in all three."""

    w: Any  # [L, in..., out...]
    a: Any  # [L, in..., r]
    b: Any  # [L, r, out...]
    scale: float = struct.field(pytree_node=False)


def product(spec: str, x: Array, w: Array | LowRank) -> Array:
    """`jnp.einsum(spec, x, w)`, also for a LowRank; letters of w that the result lacks are in."""
    if not isinstance(w, LowRank):
        return jnp.einsum(spec, x, w)
    left, _, out = spec.partition("->")
    of_x, of_w = left.split(",")
    inner = "".join(letter for letter in of_w if letter not in out)
    kept = "".join(letter for letter in of_x if letter not in inner)
    low = jnp.einsum(f"{of_x},{inner}r->{kept}r", x, w.a)
    low = jnp.einsum(f"{kept}r,r{of_w.removeprefix(inner)}->{out}", low, w.b)
    return jnp.einsum(spec, x, w.w) + low * jnp.asarray(w.scale, low.dtype)
