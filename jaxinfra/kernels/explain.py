"""A kernel in words: its schedule, its budget of shared memory, where it stands under the roof."""

from __future__ import annotations

import importlib
import inspect

from jaxinfra.errors import UserError
from jaxinfra.hardware.chips import find
from jaxinfra.kernels.matmul_shapes import SHAPES
from pallas_kernels.matmul import configs, mosaic_gpu
from pallas_kernels.matmul.ladder import STEPS
from pallas_kernels.matmul.mosaic_gpu import SHARED_MEMORY

NAMES = ("matmul", *(f"matmul.{step}" for step in STEPS))


def explain(name: str) -> None:
    """Prints what the module says of its schedule; for the product, the choice for every shape."""
    if name not in NAMES:
        raise UserError(f"kernels explain: no kernel {name!r}; there are {', '.join(NAMES)}")
    if name != "matmul":
        step = importlib.import_module(f"pallas_kernels.matmul.ladder.{name.partition('.')[2]}")
        print(inspect.getdoc(step))
        return
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
