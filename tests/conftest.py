"""Every test runs on eight emulated CPU devices, with warnings as errors and strict dtypes."""

import functools
import importlib.util
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

import hypothesis
import jax
import pytest

# Hypothesis would fail an example that takes 0.2 s, and examples that take long to make.
hypothesis.settings.register_profile(
    "slow machines", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("slow machines")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("live"):
        _first_cosine()


@functools.cache
def _first_cosine() -> None:
    """Has one thread ask MKL for its first cosine and sine in this process.

    Where several ask at once, what they get may be off by 1.5e-4, and logits behind them by as much
    (github.com/pytorch/pytorch/issues/188792).
    """
    if importlib.util.find_spec("torch"):
        import torch

        for first in (torch.cos, torch.sin):
            first(torch.zeros(1))


@pytest.fixture
def key() -> jax.Array:
    """A random key; fold or split it."""
    return jax.random.key(0)
