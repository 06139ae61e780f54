"""Matmul on one Hopper GPU beside XLA (cuBLAS): the ladder, the product, fused epilogues.

Contestants take turns in one process, by device time, on normal bfloat16 data. Each result is
first held to XLA's; a kernel that is wrong is not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxinfra.errors import UserError
from jaxinfra.hardware.detect import detect
from jaxinfra.kernels.matmul_shapes import SHAPES, inputs, tflops
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.measure.turns import device_turns
from pallas_kernels.matmul import Epilogue, interleave, matmul, supported
from pallas_kernels.matmul.ladder import STEPS

LADDER_SHAPE = (4096, 4096, 4096)
COMMAND = "jaxinfra kernels bench"
PEER = "XLA (cuBLAS)"


def bench(out: Path | None) -> None:
    """Prints the tables; with `out`, a folder, also writes the ledger's entries."""
    if reason := supported("mosaic_gpu", jnp.bfloat16):
        raise UserError(f"kernels bench: {reason}")
    console, ratios = Console(), {}
    for title, measure in (
        ("The ladder", ladder), ("The product", product), ("Fused epilogues", epilogues)
    ):  # fmt: skip
        table = Table("", "TFLOP/s", PEER, "ratio", "95 %", title=title, title_justify="left")
        for entry in measure():
            ours, peer = (median(v) for v in entry.samples.values())
            assert entry.ratio is not None and entry.interval is not None
            low, high = entry.interval
            ratios.setdefault(title, []).append(entry.ratio)
            cells = f"{ours:.0f}", f"{peer:.0f}", f"{entry.ratio:.3f}", f"{low:.3f}-{high:.3f}"
            table.add_row(entry.claim, *cells)
            if out is not None:
                write(entry, out)
        console.print(table)
        console.print(f"geometric mean of the ratios: {geometric_mean(ratios[title]):.3f}\n")


def ladder() -> Iterator[Entry]:
    """Every step at 4,096 cubed."""
    a, b = inputs(*LADDER_SHAPE)
    reference = jax.jit(jnp.matmul)
    runs: dict[str, Callable[[], Any]] = {PEER: partial(reference, a, b)}
    for name in STEPS:
        step = jax.jit(importlib.import_module(f"pallas_kernels.matmul.ladder.{name}").matmul)
        runs[name] = partial(step, a, b)
    seconds, clock = _timed(runs)
    for number, name in enumerate(STEPS, 1):
        claim = f"Matmul ladder, step {number}, {name.replace('_', ' ')}: 4,096 cubed, bfloat16"
        yield _entry(
            f"matmul-ladder-{number}-{name.replace('_', '-')}", claim, LADDER_SHAPE,
            seconds[name], seconds[PEER], clock, "one shape: the best step depends on it",
        )  # fmt: skip


def product() -> Iterator[Entry]:
    """`matmul(implementation="mosaic_gpu")` on every shape."""
    for shape in SHAPES:
        a, b = inputs(*shape)
        ours = jax.jit(lambda a, b: matmul(a, b, implementation="mosaic_gpu"))
        theirs = jax.jit(jnp.matmul)
        seconds, clock = _timed({"ours": partial(ours, a, b), PEER: partial(theirs, a, b)})
        size = " x ".join(f"{n:,}" for n in shape)
        yield _entry(
            "matmul-product-" + "x".join(map(str, shape)), f"Matmul, M x N x K {size}, bfloat16",
            shape, seconds["ours"], seconds[PEER], clock,
            "the kernel asked for by name; left to choose, `matmul` takes XLA where that is faster",
        )  # fmt: skip


def epilogues() -> Iterator[Entry]:
    """What follows a product in the same kernel, beside XLA's product and what XLA fuses to it."""
    shape = (8192, 6144, 2048)
    M, N, _ = shape
    a, b = inputs(*shape)
    residual = jax.random.normal(jax.random.key(2), (M, N), jnp.bfloat16)
    bias = jax.random.normal(jax.random.key(3), (N,), jnp.float32)
    gate, up = b[:, : N // 2], b[:, N // 2 :]
    pairs = interleave(gate, up)

    def swiglu_of_xla(a):
        both = (a @ b).astype(jnp.float32)
        return (jax.nn.silu(both[:, : N // 2]) * both[:, N // 2 :]).astype(a.dtype)

    cases = {
        "swiglu": (pairs, Epilogue(activation="swiglu"), swiglu_of_xla),
        "bias-gelu": (
            b, Epilogue(bias=bias, activation="gelu"),
            lambda a: jax.nn.gelu((a @ b).astype(jnp.float32) + bias).astype(a.dtype),
        ),
        "residual": (b, Epilogue(residual=residual), lambda a: a @ b + residual),
    }  # fmt: skip
    for name, (weight, epilogue, reference) in cases.items():
        ours = jax.jit(
            lambda a, weight=weight, epilogue=epilogue: matmul(
                a, weight, epilogue=epilogue, implementation="mosaic_gpu"
            )
        )
        theirs = jax.jit(reference)
        seconds, clock = _timed({"ours": partial(ours, a), PEER: partial(theirs, a)})
        claim = f"Matmul with {name.replace('-', ' + ')}: 8,192 x 6,144 x 2,048, bfloat16"
        yield _entry(
            f"matmul-epilogue-{name}", claim, shape, seconds["ours"], seconds[PEER], clock,
            "only the product's FLOPs are counted; XLA may fuse the epilogue to cuBLAS or not",
        )  # fmt: skip


def _timed(runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, list[float]], str]:
    wanted = runs[PEER]().astype(jnp.float32)
    scale = jnp.max(jnp.abs(wanted))
    for name, run in runs.items():
        error = float(jnp.max(jnp.abs(run().astype(jnp.float32) - wanted)) / scale)
        if not error < 0.01:
            raise RuntimeError(f"kernels bench: {name} is off by {error:.2g} of the largest value")
    return device_turns(runs)


def _entry(
    name: str,
    claim: str,
    shape: tuple[int, int, int],
    ours: list[float],
    theirs: list[float],
    clock: str,
    mislead: str,
) -> Entry:
    peak = detect().flops["bfloat16"]
    assert peak is not None
    samples = {
        "jaxinfra": [tflops(shape, s) for s in ours], PEER: [tflops(shape, s) for s in theirs]
    }  # fmt: skip
    return Entry(
        name=name, claim=claim, command=COMMAND, unit="TFLOP/s", samples=samples,
        ratio=median(theirs) / median(ours), interval=ratio_interval(tuple(ours), tuple(theirs)),
        roofline=median(samples["jaxinfra"]) * 1e12 / peak,
        roof=f"{peak / 1e12:.0f} TFLOP/s bfloat16 on paper",
        inputs="normal, in turns in one process, warm; seconds of the device: " + clock,
        mislead=mislead, environment=environment(),
    )  # fmt: skip
