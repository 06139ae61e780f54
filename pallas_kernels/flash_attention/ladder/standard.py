"""Step 1, standard: logits, softmax, product, each a pass over memory.

For T queries and S keys a head, T S logits are written in float32 and read, and T S weights in 16
bits: 12 T S bytes of traffic beside 4 T S H FLOPs, H / 3 FLOPs a byte. A chip that does 200 FLOPs
in the time of a byte waits for memory, however fast its products are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.ladder import check


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v of 16-bit floats, by XLA; there is no kernel to interpret."""
    del interpret
    check(q, k, v, 1, 1)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    logits = lax.optimization_barrier(logits * q.shape[3] ** -0.5)
    weights = lax.optimization_barrier(jax.nn.softmax(logits, axis=-1).astype(q.dtype))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)
