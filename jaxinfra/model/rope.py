"""Rotary position embedding (arXiv 2104.09864), half-split as Hugging Face stores it."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfra.model.config import Rope
from pallas_kernels.norm_rope import reference


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a position of each pair, [H/2] float32, after the config's frequency scaling.

    "llama3" keeps high frequencies, divides low ones by `factor` and blends between
    (`_compute_llama3_parameters` in transformers' modeling_rope_utils.py).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freq = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "linear":
        return (freq / np.float32(rope.factor)).astype(np.float32)
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / freq
        turns = rope.original_max_seq_len / wavelength
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return ((1 - blend) * freq / rope.factor + blend * freq).astype(np.float32)
    return freq


def table(
    rope: Rope, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """(cos, sin) of every position and pair, h = H/2, float32."""
    angle = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(
        frequencies(rope, head_dim)
    )
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], cos_sin: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]
) -> Float[Array, "B T N H"]:
    """Turns the pairs (x[i], x[i + H/2]) by their angles; computed in float32."""
    return reference.rotate(x.astype(jnp.float32), *cos_sin).astype(x.dtype)
