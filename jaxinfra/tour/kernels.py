"""The tour's stage of kernels: for a GPU that need not be here, proven by an interpreter."""

from __future__ import annotations

import contextlib
import importlib
import io
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.tour.shell import Tour
from pallas_kernels import interpreter
from pallas_kernels.interpreter import RaceError, interpret
from pallas_kernels.matmul import reference
from pallas_kernels.matmul.ladder import STEPS, broken

SIZE, LARGE = (256, 512, 192), (4096, 4096, 4096)  # M, N, K: interpreted, lowered


def stage(tour: Tour) -> None:
    """Runs the Hopper matmul ladder in the interpreter, lowers it, and finds planted races."""
    section = tour.report.section("Kernels for a GPU, on this machine")
    steps = STEPS[:2] if tour.quick else [s for s in STEPS if _interpretable(s)]
    with jax.default_device(jax.devices("cpu")[0]):
        rows = []
        for name in steps:
            rows.append(_climb(name))
            tour.console.print(
                f"{name:16} largest error {rows[-1][1]:.1e}, no race; lowered for CUDA",
                highlight=False,
            )
        found = [(mistake, _caught(mistake)) for mistake in broken.MISTAKES if _findable(mistake)]
    for mistake, caught in found:
        tour.console.print(
            f"planted: {broken.MISTAKES[mistake]}: {'caught' if caught else 'NOT caught'}",
            highlight=False,
        )
    section.text(
        "Matrix multiplication for Hopper in Pallas Mosaic GPU, one technique a step. No such GPU "
        "is needed: an interpreter runs every warpgroup, asynchronous copy and barrier on the CPU, "
        f"here for [{SIZE[0]}, {SIZE[2]}] x [{SIZE[2]}, {SIZE[1]}] in bfloat16, and a race "
        "detector watches; then the same kernel is lowered for CUDA at 4,096 cubed. Seconds are "
        "those of the interpreter, not of a GPU."
    )
    for name in STEPS:
        if name not in steps and not tour.quick:
            section.text(f"Step {name} is left out: it is interpreted from jax 0.11 on.")
    section.table(
        "The matmul ladder",
        ("step", "largest relative error", "interpreted in s", "lowered in s"),
        rows,
    )
    section.table(
        "Mistakes planted in a ring of two slots",
        ("mistake", "race detector"),
        [(broken.MISTAKES[m], "caught" if caught else "not caught") for m, caught in found],
    )
    if not all(caught for _, caught in found):
        raise RuntimeError("the race detector missed a planted mistake")


def _climb(name: str) -> tuple[str, float, float, float]:
    """The step's name, its largest relative error, seconds to interpret and to lower it."""
    step = importlib.import_module(f"pallas_kernels.matmul.ladder.{name}").matmul
    (M, N, K), rng = SIZE, np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((M, K), (K, N)))
    start = time.perf_counter()
    found = interpret(step, a, b)
    interpreted = time.perf_counter() - start
    exact = reference.matmul(a.astype(jnp.float32), b.astype(jnp.float32))
    error = float(jnp.max(jnp.abs(found.astype(jnp.float32) - exact)) / jnp.max(jnp.abs(exact)))
    M, N, K = LARGE
    shapes = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((M, K), (K, N)))
    start = time.perf_counter()
    jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",))
    return name, error, interpreted, time.perf_counter() - start


def _caught(mistake: str) -> bool:
    """Whether the race detector finds it; what it prints is its own business."""
    a = b = jnp.ones((64, 64), jnp.bfloat16)
    a, b = jnp.tile(a, (1, 5)), jnp.tile(b, (5, 1))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            interpret(broken.matmul, a, b, mistake=mistake)
    except RaceError:
        return True
    return False


def _interpretable(step: str) -> bool:
    return interpreter.WHOLE or step != "multicast"


def _findable(mistake: str) -> bool:
    return interpreter.WHOLE or mistake in ("multiplies early", "releases early")
