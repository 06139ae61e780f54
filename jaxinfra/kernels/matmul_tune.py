"""Times schedules of matmul on this GPU and keeps the fastest for each shape."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.files import write_file
from jaxinfra.kernels.matmul_shapes import SHAPES, inputs, tflops
from jaxinfra.measure.turns import device_turns
from pallas_kernels.matmul import configs, matmul, supported
from pallas_kernels.matmul.mosaic_gpu import SHARED_MEMORY, Config


def tune(shapes: tuple[tuple[int, int, int], ...], out: Path) -> None:
    """Writes the fastest schedule of each shape, with its timing and XLA's, into `out`.

    What `out` holds of other shapes and devices stays.
    """
    if reason := supported("mosaic_gpu", jnp.bfloat16):
        raise UserError(f"kernels tune: {reason}")
    console, device = Console(), jax.devices()[0].device_kind
    for shape in shapes or SHAPES:
        row = _fastest(shape, console)
        table = json.loads(out.read_text()) if out.exists() else {}
        others = [r for r in table.get(device, []) if (r["M"], r["N"], r["K"]) != shape]
        table[device] = sorted([*others, row], key=lambda r: (r["M"], r["N"], r["K"]))
        write_file(out, (json.dumps(table, indent=1) + "\n").encode())
        config = configs.describe(Config(**row["config"]))
        console.print(
            f"{shape}: {row['tflops']:.0f} TFLOP/s, XLA {row['xla_tflops']:.0f}; {config}"
        )


def candidates(M: int) -> list[Config]:
    """Schedules worth timing for products of M rows."""
    if M <= configs.FEW_ROWS:
        fields = itertools.product((32, 64), ((128, 6), (128, 8), (256, 3), (256, 4)), (1, 2))
        made = [
            Config(64, n, k, slots=s, cluster=c, beside=True, ping_pong=True)
            for n, (k, s), c in fields
        ]
    else:
        made = [
            dataclasses.replace(c, band=band, cluster=cluster, beside=beside)
            for (c, *_), band in itertools.product(configs.CANDIDATES, (8, 16))
            for cluster, beside in ((1, False), (2, False), (2, True))
        ]
    return [c for c in made if c.shared_memory <= SHARED_MEMORY - 1024]


def _fastest(shape: tuple[int, int, int], console: Console) -> dict[str, Any]:
    a, b = inputs(*shape)
    reference = jax.jit(jnp.matmul)
    runs: dict[Any, Any] = {None: lambda: reference(a, b)}
    for config in candidates(shape[0]):
        run = jax.jit(
            lambda a, b, config=config: matmul(a, b, config=config, implementation="mosaic_gpu")
        )
        try:
            run(a, b).block_until_ready()
        except Exception as error:  # a schedule that the compiler refuses costs only itself
            console.print(f"{config}: {str(error).splitlines()[0]}")
            continue
        runs[config] = lambda run=run: run(a, b)
    seconds, _ = device_turns(runs, rounds=3)
    speeds: dict[Any, float] = {c: tflops(shape, median(s)) for c, s in seconds.items()}
    xla = speeds.pop(None)
    best = max(speeds, key=speeds.__getitem__)
    return {
        **dict(zip("MNK", shape, strict=True)), "config": dataclasses.asdict(best),
        "tflops": round(speeds[best], 1), "xla_tflops": round(xla, 1), "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
