"""A kernel in words: its schedule, its budget of shared memory, where it stands under the roof."""

from __future__ import annotations

import importlib
import inspect

from jaxinfra.errors import UserError
from jaxinfra.hardware.chips import find
from jaxinfra.kernels.matmul_shapes import SHAPES
from pallas_kernels.flash_attention import mosaic_gpu as attention
from pallas_kernels.flash_attention import mosaic_gpu_backward
from pallas_kernels.flash_attention.ladder import STEPS as ATTENTION_STEPS
from pallas_kernels.flash_attention.mosaic_gpu_config import (
    CONFIGS,
    FUSED_CONFIGS,
    KEY_CONFIGS,
    QUERY_CONFIGS,
)
from pallas_kernels.matmul import configs, mosaic_gpu
from pallas_kernels.matmul.ladder import STEPS
from pallas_kernels.matmul.mosaic_gpu import SHARED_MEMORY

LADDERS = {"attention": "pallas_kernels.flash_attention.ladder",
           "matmul": "pallas_kernels.matmul.ladder"}  # fmt: skip
TOLD = {  # whose modules say it all
    "paged-attention": ("paged_attention.triton", "paged_attention.mosaic_gpu"),
    "losses": ("cross_entropy.mosaic_gpu",),
    "grouped": ("grouped_matmul.mosaic_gpu", "grouped_matmul.mosaic_gpu_wgrad"),
    "quantised": ("quantised_matmul.mosaic_gpu", "quantised_matmul.triton"),
    "decode-layer": ("decode_layer.triton",),
    "norm": ("rms_norm.product", "rms_norm.triton"),
    "rope": ("norm_rope.product", "norm_rope.triton"),
}  # fmt: skip
NAMES = (
    *LADDERS, *TOLD, *(f"attention.{step}" for step in ATTENTION_STEPS),
    *(f"matmul.{x}" for x in STEPS),
)  # fmt: skip


def explain(name: str) -> None:
    """Prints what the module says of its schedule; for the product, the choice for every shape."""
    if name not in NAMES:
        raise UserError(f"kernels explain: no kernel {name!r}; there are {', '.join(NAMES)}")
    kernel, _, step = name.partition(".")
    for module in TOLD.get(name, ()):
        print(inspect.getdoc(importlib.import_module(f"pallas_kernels.{module}")), end="\n\n")
    if step:
        print(inspect.getdoc(importlib.import_module(f"{LADDERS[kernel]}.{step}")))
    elif kernel == "attention":
        _attention()
    elif kernel == "matmul":
        _matmul()


def _matmul() -> None:
    print(inspect.getdoc(mosaic_gpu))
    chip = find("H200")
    peak = chip.flops["bfloat16"]
    assert peak is not None
    print(
        f"\nOn an {chip.name}: {peak / 1e12:.0f} TFLOP/s and {chip.bandwidth / 1e12:.1f} TB/s, so "
        f"the ridge is at {peak / chip.bandwidth:.0f} FLOPs a byte; a block has "
        f"{SHARED_MEMORY:,} bytes of shared memory.\n"
    )
    for M, N, K in SHAPES:
        config = configs.choose(M, N, K, 1, 132, pairs=False)
        intensity = M * N * K / (M * K + K * N + M * N)  # 2 FLOPs, 2 bytes
        bound = "computing" if intensity > peak / chip.bandwidth else "memory"
        print(f"{M} x {N} x {K}: {intensity:.0f} FLOPs a byte, bound by {bound}")
        print(f"    {configs.describe(config)}")


def _attention() -> None:
    for module in (attention, mosaic_gpu_backward):
        print(inspect.getdoc(module), end="\n\n")
    kernels = (
        ("output", CONFIGS), ("all gradients", FUSED_CONFIGS), ("gradient of q", QUERY_CONFIGS),
        ("gradients of k and v", KEY_CONFIGS),
    )  # fmt: skip
    for H in CONFIGS:
        print(f"heads of {H}:")
        for what, configs_of in kernels:
            if config := configs_of.get(H):
                used = config.shared_memory(H)
                print(f"    {what}: {config.warpgroups} warpgroups multiply, {used:,} of "
                      f"{SHARED_MEMORY:,} bytes of shared memory")  # fmt: skip
