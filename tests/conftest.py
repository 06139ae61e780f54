"""Every test runs on eight emulated CPU devices, with warnings as errors and strict dtypes."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is what tests cost: code that is slower to run is ready in half the time. Later
# compilers than jax 0.10's do not have the last option's emitter.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""),
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def key() -> jax.Array:
    """A random key; fold or split it."""
    return jax.random.key(0)
