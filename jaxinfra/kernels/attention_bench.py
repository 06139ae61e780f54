"""Attention on one Hopper GPU beside cuDNN, tokamax and jax-linear-attention, where installed.

Contestants take turns in one process, by device time, on normal bfloat16 data: the ladder's steps,
the product's forward pass, and with it the gradients of q, k and v. Each output is first held to
cuDNN's, by its largest and by its mean square difference; a kernel that is wrong is not timed.
"""

from __future__ import annotations

import importlib.util
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
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.measure.turns import device_turns
from pallas_kernels.flash_attention import attention, supported
from pallas_kernels.flash_attention.ladder import STEPS, account

SHAPES = (  # B, S, N, K, H, causal
    (4, 4096, 16, 16, 128, True),
    (1, 16384, 16, 16, 128, True),
    (1, 16384, 16, 16, 128, False),
    (4, 4096, 32, 8, 128, True),
    (2, 8192, 32, 32, 64, True),
    (1, 16384, 8, 8, 256, True),
)
OURS, PEER = "jaxinfra", "cuDNN"


def bench(out: Path | None) -> None:
    """Prints the tables; with `out`, a folder, also writes the ledger's entries."""
    if reason := supported("mosaic_gpu", (1, 128, 1, 128), (1, 128, 1, 128), jnp.bfloat16):
        raise UserError(f"kernels bench attention: {reason}")
    console = Console()
    for title, entries in (
        ("The ladder", ladder()), ("Forward", product(False)),
        ("Forward and backward", product(True)),
    ):  # fmt: skip
        table = Table("", "TFLOP/s", "of the peers", "ratio to the best", "95 %", title=title)
        ratios = []
        for entry in entries:
            rates = {name: median(samples) for name, samples in entry.samples.items()}
            ours = rates.pop(OURS)
            assert entry.ratio is not None and entry.interval is not None
            ratios.append(entry.ratio)
            table.add_row(
                entry.claim.partition(": ")[2], f"{ours:.0f}",
                ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()),
                f"{entry.ratio:.3f}", "{:.3f}-{:.3f}".format(*entry.interval),
            )  # fmt: skip
            if out is not None:
                write(entry, out)
        console.print(table)
        console.print(f"geometric mean of the ratios: {geometric_mean(ratios):.3f}\n")


def ladder() -> Iterator[Entry]:
    """Every step, without a mask."""
    B, S, N, H = 4, 4096, 16, 128
    q, k, v, _ = _inputs(B, S, N, N, H)
    runs = {PEER: partial(jax.jit(contestants(False)[PEER]), q, k, v)}
    for name in STEPS:
        step = importlib.import_module(f"pallas_kernels.flash_attention.ladder.{name}")
        runs[name] = partial(jax.jit(step.attention), q, k, v)
    _hold(runs, H)
    seconds, clock = device_turns(runs)
    for number, name in enumerate(STEPS, 1):
        flops = account(name, B, S, S, N, H).flops
        rates = {OURS: [flops / s / 1e12 for s in seconds[name]],
                 PEER: [flops / s / 1e12 for s in seconds[PEER]]}  # fmt: skip
        claim = name.replace("_", " ")
        yield _entry(
            f"attention-ladder-{number}-{name.replace('_', '-')}",
            f"Attention ladder, step {number}: {claim}, B{B} S{S:,} H{N} D{H} full, bfloat16",
            rates, PEER, clock, "one shape, without a mask: a causal one rewards other plans",
        )  # fmt: skip


def product(gradients: bool) -> Iterator[Entry]:
    """One entry a shape: all contestants, ours against the fastest of the others."""
    for B, S, N, K, H, causal in SHAPES:
        q, k, v, dout = _inputs(B, S, N, K, H)
        runs = {
            name: _run(of, q, k, v, dout, gradients) for name, of in contestants(causal).items()
        }
        _hold(runs, H)
        seconds, clock = device_turns(runs)
        flops = 4 * B * N * S * S * H * (3.5 if gradients else 1) / (2 if causal else 1)
        best = min((name for name in runs if name != OURS), key=lambda name: median(seconds[name]))
        samples = {
            name: [flops / s / 1e12 for s in seconds[name]]
            for name in dict.fromkeys((OURS, best, *runs))
        }
        mask, heads = "causal" if causal else "full", f"{N}" if N == K else f"{N}/{K}"
        passes = "forward and backward" if gradients else "forward"
        yield _entry(
            f"attention-{'train' if gradients else 'forward'}-{B}x{S}x{N}-{K}x{H}-{mask}",
            f"Attention, {passes}: B{B} S{S:,} H{heads} D{H} {mask}, bfloat16",
            samples, best, clock,
            "FLOPs are 4 B N S^2 H forward and 10 backward, half of both where causal, "
            f"whatever a kernel computes; the ratio is to {best}, the fastest of the others",
        )  # fmt: skip


def _inputs(B: int, S: int, N: int, K: int, H: int) -> list[Any]:
    """q, k, v and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (B, S, heads, H), jnp.bfloat16)
        for key, heads in zip(keys, (N, K, K, N), strict=True)
    ]


def _hold(runs: dict[str, Callable[[], Any]], H: int) -> None:
    """Drops peers that do not take the call; raises where one gives something else than cuDNN."""
    wanted = jax.tree.map(lambda x: x.astype(jnp.float32), runs[PEER]())
    for name in list(runs):
        try:
            found = runs[name]()
        except Exception as error:
            if name in (OURS, PEER):
                raise
            print(f"{name} does not take heads of {H}: {str(error).partition(chr(10))[0]:.80}")
            del runs[name]
            continue
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            off = jnp.abs(got.astype(jnp.float32) - want)
            # Under a causal mask the first rows have values a hundred times those of the last.
            for of in (jnp.max, lambda x: jnp.sqrt(jnp.mean(x[:, -1000:] ** 2))):
                if not float(of(off)) < 0.02 * float(of(jnp.abs(want))):
                    raise RuntimeError(
                        f"kernels bench attention: {name} is off by {float(of(off)):.2g}"
                    )


def _entry(
    name: str, claim: str, samples: dict[str, list[float]], best: str, clock: str, mislead: str
) -> Entry:
    peak = detect().flops["bfloat16"]
    assert peak is not None
    return Entry(
        name=name, claim=claim, command="jaxinfra kernels bench attention", unit="TFLOP/s",
        samples=samples, ratio=median(samples[OURS]) / median(samples[best]),
        interval=ratio_interval(
            tuple(1 / x for x in samples[OURS]), tuple(1 / x for x in samples[best])
        ),
        roofline=median(samples[OURS]) * 1e12 / peak,
        roof=f"{peak / 1e12:.0f} TFLOP/s bfloat16 on paper",
        inputs="normal, in turns in one process, warm; seconds of the device: " + clock,
        mislead=mislead, environment=environment(),
    )  # fmt: skip


def contestants(causal: bool) -> dict[str, Callable[..., Any]]:
    """What is installed, each a function of q, k, v."""
    found: dict[str, Callable[..., Any]] = {
        OURS: partial(attention, causal=causal, implementation="mosaic_gpu"),
        PEER: partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn"),
    }
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]

        found["tokamax"] = partial(
            tokamax.dot_product_attention, is_causal=causal, implementation="mosaic"
        )
    if causal and importlib.util.find_spec("jla"):
        from jla.ops.mosaic_gpu import attention as jla  # pyright: ignore[reportMissingImports]

        found["jax-linear-attention"] = jla.flash_attention
        found["jax-linear-attention, fused"] = partial(jla.flash_attention, backward="fused")
    return found


def _run(
    of: Callable[..., Any], q: Any, k: Any, v: Any, dout: Any, gradients: bool
) -> Callable[[], Any]:
    def both(q, k, v, dout):
        out, pull = jax.vjp(of, q, k, v)
        return out, pull(dout)

    return partial(jax.jit(both), q, k, v, dout) if gradients else partial(jax.jit(of), q, k, v)
