"""The shapes that matmul is measured and tuned with, and their inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

SHAPES = (  # M, N, K; the last two fit no tile
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (16384, 1024, 4096),
    (8192, 3072, 1024),
    (512, 8192, 8192),
    (64, 4096, 4096),
    (4104, 4160, 4032),
    (1000, 10048, 3008),
)


def inputs(M: int, N: int, K: int) -> tuple[Array, Array]:
    """Normal a [M, K] and b [K, N] in bfloat16."""
    keys = jax.random.split(jax.random.key(0))
    return tuple(  # type: ignore[return-value]
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((M, K), (K, N)), strict=True)
    )


def tflops(shape: tuple[int, int, int], seconds: float) -> float:
    """TFLOP/s of a product of `shape`."""
    M, N, K = shape
    return 2 * M * N * K / seconds / 1e12
