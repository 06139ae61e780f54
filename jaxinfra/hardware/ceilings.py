"""What this machine reaches: bytes a second of a copy, FLOP/s of a square matrix product.

A roof on paper is not reached; these are. The copy negates an array in place (donated), so that
every byte is read once and written once, and counts both. Inputs are random normal numbers: zeros
draw less power and run faster. Sizes grow until one call takes long enough to hide its dispatch.

    python -m jaxinfra roofline tiny --chip here
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxinfra.measure.clock import time


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates measured on one device in this process."""

    device_kind: str
    bandwidth: float  # bytes/s, read and written
    copied_bytes: int  # size of the array
    flops: Mapping[str, float]  # FLOP/s by dtype
    sizes: Mapping[str, int]  # n of the [n, n] matrices by dtype


def ceilings(device: jax.Device | None = None, budget: float = 3.0) -> Ceilings:
    """Measures `device`, the default one if None, in about `budget` seconds plus compiling.

    CPUs are measured in float32 and bfloat16; GPUs and TPUs in bfloat16, a T4 in float16.
    """
    target = jax.local_devices()[0] if device is None else device
    if target.platform == "cpu":
        dtypes, start = ("float32", "bfloat16"), 256
    else:
        old = float(getattr(target, "compute_capability", 8)) < 8  # no bfloat16 in hardware
        dtypes, start = ("float16" if old else "bfloat16",), 8192
    share = budget / (1 + len(dtypes))
    flops, sizes = {}, {}
    with jax.default_device(target):
        copied, bandwidth = _copy(target, share)
        for dtype in dtypes:
            sizes[dtype], flops[dtype] = _matmul(dtype, start, share)
    return Ceilings(target.device_kind, bandwidth, copied, flops, sizes)


def memory_bytes(device: jax.Device) -> int | None:
    """Bytes of memory that arrays on `device` can use; None where nobody says."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _copy(device: jax.Device, budget: float) -> tuple[int, float]:
    most = min(4 << 30, (memory_bytes(device) or 1 << 30) // 8)
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def seconds(size: int, budget: float) -> float:
        block = jax.random.normal(jax.random.key(0), (1 << 20,), jnp.float32)  # 4 MiB, repeated
        array = jnp.tile(block, size >> 22)

        def call() -> jax.Array:
            nonlocal array
            array = negate(array)
            return array

        return time(call, seconds=budget, least=2, most=20).median

    size = _grow(lambda size: seconds(size, 0.0), 16 << 20, most, 1, budget)
    return size, 2 * size / seconds(size, budget)


def _matmul(dtype: str, start: int, budget: float) -> tuple[int, float]:
    product = jax.jit(jnp.matmul)

    def seconds(n: int, budget: float) -> float:
        keys = jax.random.split(jax.random.key(1))
        a, b = (jax.random.normal(key, (n, n), jnp.float32).astype(dtype) for key in keys)
        return time(product, a, b, seconds=budget, least=2, most=20).median

    n = _grow(lambda n: seconds(n, 0.0), start, 16384, 3, budget)
    return n, 2 * n**3 / seconds(n, budget)


def _grow(seconds: Callable[[int], float], size: int, most: int, power: int, budget: float) -> int:
    """The size, a power of two times the first, whose call fills about a tenth of the budget."""
    ratio = (budget / 10 / seconds(size)) ** (1 / power)
    return size if ratio < 2 else min(size << int(math.log2(ratio)), max(size, most))
