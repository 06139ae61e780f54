"""Every test runs on eight emulated CPU devices, with warnings as errors and strict dtypes."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is what tests cost: code that is slower to run is ready a fifth sooner.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def key() -> jax.Array:
    """A random key; fold or split it."""
    return jax.random.key(0)
