"""Every test runs on eight emulated CPU devices, with warnings as errors and strict dtypes."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def key() -> jax.Array:
    """A random key; fold or split it."""
    return jax.random.key(0)
