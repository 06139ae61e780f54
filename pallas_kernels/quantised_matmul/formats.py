"""How numbers are kept in 8 and 4 bits, and the scales that bring them back.

    float8_e4m3fn    one scale a tensor; a row's for every 128 of K; or one for every 128 x 128
    int8             one scale for every output and group of n inputs
    4 bits           the same; two numbers a byte, the earlier one low, each plus 8

A scale is the largest magnitude of what shares it over 448, 127 or 7: no value is cut off. Integer
weights lie as [g, N, n] with scales [g, N], groups first.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

BLOCK = 128
FP8 = jnp.float8_e4m3fn
_LARGEST = 448.0  # of float8_e4m3fn


def fp8_tensor(x: Float[Array, "M K"]) -> tuple[Float[Array, "M K"], Float[Array, ""]]:
    """Values, and the one scale of all."""
    scale = _scale(jnp.max(jnp.abs(x)).astype(jnp.float32), _LARGEST)
    return (x.astype(jnp.float32) / scale).astype(FP8), scale


def fp8_rows(x: Float[Array, "M K"]) -> tuple[Float[Array, "M K"], Float[Array, "M k"]]:
    """Values, and a scale for every row and 128 of K, a multiple of 128."""
    M, K = x.shape
    parts = x.astype(jnp.float32).reshape(M, K // BLOCK, BLOCK)
    scale = _scale(jnp.max(jnp.abs(parts), axis=-1), _LARGEST)
    return (parts / scale[..., None]).astype(FP8).reshape(M, K), scale


def fp8_blocks(w: Float[Array, "N K"]) -> tuple[Float[Array, "N K"], Float[Array, "n k"]]:
    """Values, and a scale for every 128 x 128; K is a multiple of 128, the last rows may be few."""
    N, K = w.shape
    whole = jnp.pad(w.astype(jnp.float32), ((0, -N % BLOCK), (0, 0)))
    parts = whole.reshape(-1, BLOCK, K // BLOCK, BLOCK)
    scale = _scale(jnp.max(jnp.abs(parts), axis=(1, 3)), _LARGEST)
    values = (parts / scale[:, None, :, None]).astype(FP8)
    return values.reshape(-1, K)[:N], scale


def integers(
    w: Float[Array, "N K"], bits: int, group: int
) -> tuple[Int8[Array, "g N n"] | UInt8[Array, "g N m"], Float[Array, "g N"]]:
    """Values of 8 or 4 bits, and a scale for every output and `group` inputs, of which K has some.

    Raises ValueError: other bits, or a group that does not divide K or is odd.
    """
    N, K = w.shape
    if bits not in (8, 4) or K % group or group % 2:
        raise ValueError(
            f"integers: w{w.shape}, {bits=}, {group=}; want 8 or 4 bits, K in even groups"
        )
    parts = jnp.swapaxes(w.astype(jnp.float32).reshape(N, K // group, group), 0, 1)
    largest = 2 ** (bits - 1) - 1
    scale = _scale(jnp.max(jnp.abs(parts), axis=-1), largest)
    values = jnp.round(parts / scale[..., None]).astype(jnp.int8)
    return (values if bits == 8 else pack(values)), scale


def pack(values: Int8[Array, "*g N n"]) -> UInt8[Array, "*g N m"]:
    """Numbers of -8..7, two a byte."""
    shifted = (values + 8).astype(jnp.uint8)
    return shifted[..., ::2] | shifted[..., 1::2] << 4


def unpack(values: UInt8[Array, "*g N m"]) -> Int8[Array, "*g N n"]:
    """The inverse of `pack`."""
    low, high = (values & 15).astype(jnp.int8) - 8, (values >> 4).astype(jnp.int8) - 8
    return jnp.stack([low, high], axis=-1).reshape(*values.shape[:-1], -1)


def _scale(largest: Array, limit: float) -> Array:
    """That of a part whose largest magnitude is given; 1 for zeros."""
    return jnp.where(largest > 0, largest / limit, 1.0)
