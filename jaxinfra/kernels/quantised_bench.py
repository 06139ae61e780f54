"""Products of quantised matrices on one NVIDIA GPU beside those of 16-bit floats.

    python -m jaxinfra.kernels.quantised_bench [FOLDER [floats | weights]]

Contestants take turns in one process, by device time, on normal data. 8-bit floats are multiplied
with one scale a tensor and with one a block; few rows with weights of 8 and 4 bits, in as many
matrices as the L2 cache does not hold. Each is first held to the reference; one that is wrong or
that a compiler refuses is named and left out. FOLDER gets the ledger's entries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from jaxinfra.errors import UserError
from jaxinfra.hardware.detect import detect, here
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.measure.turns import device_turns
from jaxinfra.model.quantized import QuantizedMatrix, product
from pallas_kernels.quantised_matmul import (
    fp8_blocks,
    fp8_matmul,
    fp8_rows,
    fp8_tensor,
    integers,
    reference,
    weight_matmul,
)
from pallas_kernels.quantised_matmul.mosaic_gpu import Config
from pallas_kernels.quantised_matmul.triton import Tiles

COMMAND = "python -m jaxinfra.kernels.quantised_bench"
OURS, PEER = "jaxinfra", "XLA, bfloat16"
CUBES = (4096, 8192)
CONFIGS = (Config(128, cluster=2), Config(192, 4), Config(192, 4, cluster=2))
WEIGHTS = ((4096, 4096, 12), (1024, 3072, 40))  # K, N, matrices
ROWS, GROUP = (1, 16, 64), 128
TILES = (
    Tiles(64, 128, 8), Tiles(64, 128, 4, num_stages=6), Tiles(32, 128, 4),
    Tiles(128, 128, 8, num_warps=8),
)  # fmt: skip


def bench(out: Path | None, only: str | None = None) -> None:
    """Prints a table a shape; with `out`, a folder, also writes the ledger's entries."""
    if jax.default_backend() != "gpu":
        raise UserError("quantised_bench: no NVIDIA GPU here")
    console = Console(width=110)
    for measure in (of for of in (floats, weights) if only in (None, of.__name__)):
        for entry in measure(console):
            if out is not None:
                write(entry, out)


def floats(console: Console) -> Iterator[Entry]:
    """8-bit floats: one entry a size and kind of scale."""
    for size in CUBES:
        keys = jax.random.split(jax.random.key(0))
        x, w = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
        flops = 2 * size**3
        for kind, of_a, of_b in (
            ("one scale a tensor", fp8_tensor, fp8_tensor),
            ("a scale a block", fp8_rows, fp8_blocks),
        ):  # fmt: skip
            (a, a_scale), (b, b_scale) = jax.jit(of_a)(x), jax.jit(of_b)(w)
            operands = a, b, a_scale, b_scale
            want = jax.jit(partial(reference.fp8_matmul, dtype=jnp.float32))(*operands)
            runs: dict[str, Callable[[], Any]] = {
                f"{OURS} {c.tile_n} x{c.slots} band {c.band} cluster {c.cluster}": _jit(
                    partial(fp8_matmul, implementation="mosaic_gpu", config=c), *operands
                )
                for c in CONFIGS
            }
            runs["XLA, float8"] = _jit(partial(fp8_matmul, implementation="xla"), *operands)
            if not a_scale.ndim:
                runs["XLA, float8, scaled operands"] = _jit(_scaled_operands, *operands)
            title = f"float8_e4m3fn, {size:,} cubed, {kind}"
            runs = _held(title, runs, want)
            # Held to no reference: its operands were not rounded to 8 bits.
            runs[PEER] = _jit(lambda x, w: x @ w.T, x, w)
            seconds, clock = device_turns(runs, rounds=2, calls=5)
            rates = {n: [flops / s / 1e12 for s in taken] for n, taken in seconds.items()}
            _print(console, title, seconds, rates, "TFLOP/s")
            peak = detect().flops["float8"]
            assert peak is not None
            yield from _entries(
                f"fp8-matmul-{size}-{'blocks' if a_scale.ndim else 'tensor'}", title, rates,
                "TFLOP/s", peak / 1e12, f"{peak / 1e12:.0f} TFLOP/s of 8-bit floats on paper",
                clock, "the ratio is to the fastest other, of 16-bit floats too, whose result is "
                "more exact; to round the operands takes time that is not in it",
            )  # fmt: skip


def _scaled_operands(a: Array, b: Array, a_scale: Array, b_scale: Array) -> Array:
    """The form that XLA knows for a product of 8-bit floats with scales."""
    a, b = (
        (v.astype(jnp.bfloat16) * s.astype(jnp.bfloat16)) for v, s in ((a, a_scale), (b, b_scale))
    )
    return jnp.einsum("mk,nk->mn", a, b)


def weights(console: Console) -> Iterator[Entry]:
    """Weights of 8 and 4 bits: one entry a shape, number of rows and of bits."""
    bandwidth = here().bandwidth
    for K, N, L in WEIGHTS:
        keys = jax.random.split(jax.random.key(1), L + 1)
        dense = [jax.random.normal(key, (N, K), jnp.bfloat16) for key in keys[1:]]
        rounded = {bits: jax.jit(partial(integers, bits=bits, group=GROUP)) for bits in (8, 4)}
        quantised = {bits: [of(w) for w in dense] for bits, of in rounded.items()}
        for M in ROWS:
            x = jax.random.normal(keys[0], (M, K), jnp.bfloat16)
            title = f"{M} rows times [{K:,}, {N:,}], scales for {GROUP}"
            seconds, clock = device_turns(
                _weight_runs(title, x, dense, quantised), rounds=2, calls=5
            )
            rates = {name: [L / s for s in taken] for name, taken in seconds.items()}
            _print(console, title, {n: [s / L for s in t] for n, t in seconds.items()}, rates, "/s")
            for bits in (8, 4):
                moved = N * K * bits / 8 + 4 * N * K / GROUP
                chosen = {
                    name: rate
                    for name, rate in rates.items()
                    if f"{bits} bits" in name or name == PEER
                }
                yield from _entries(
                    f"weight-matmul-{bits}-bits-{M}x{K}x{N}",
                    f"Weights of {bits} bits, {title}", chosen, "products/s", bandwidth / moved,
                    f"{bandwidth / 1e12:.2f} TB/s of copy bandwidth measured in this run",
                    clock, f"{L} matrices in turns, so that the L2 cache does not hold them; the "
                    "kernels' time alone, without launches, which cost as much at this size",
                )  # fmt: skip


def _weight_runs(
    title: str, x: Array, dense: list[Array], quantised: Mapping[int, list[tuple[Array, Array]]]
) -> dict[str, Callable[[], Any]]:
    def each(of, matrices):
        return _jit(lambda x, matrices: [of(x, *matrix) for matrix in matrices], x, matrices)

    runs, exact = {}, jax.jit(reference.weight_matmul)
    for bits, matrices in quantised.items():
        want = [exact(x.astype(jnp.float32), *matrix) for matrix in matrices]
        contestants: dict[str, Callable[..., Any]] = {
            f"{OURS} {bits} bits: {t.block_n} x {t.block_k}, {t.splits} splits, w{t.num_warps} "
            f"s{t.num_stages}": partial(weight_matmul, implementation="triton", tiles=t)
            for t in TILES
        }
        contestants[f"XLA, {bits} bits"] = partial(weight_matmul, implementation="xla")
        if x.shape[0] == 1:  # more rows go through this kernel there
            contestants[f"the engine's, {bits} bits"] = _of_the_engine
        of_bits = {name: each(of, matrices) for name, of in contestants.items()}
        runs |= _held(title, of_bits, want)
    runs[PEER] = each(lambda x, w: x @ w.T, [(w,) for w in dense])
    return runs


def _of_the_engine(x: Array, values: Array, scales: Array) -> Array:
    """What decoding multiplies with."""
    matrix = QuantizedMatrix(values, scales, shape=(x.shape[1], scales.shape[1]))
    return product(x[None], matrix, x.dtype)[0]


def _jit(of: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    return partial(jax.jit(of), *arrays)


@jax.jit
def _off(got: Any, want: Any) -> Array:
    """The largest difference in the mean square, as a share of what is wanted, of any array."""

    def of_one(got, want):
        return jnp.sqrt(jnp.mean((got.astype(jnp.float32) - want) ** 2) / jnp.mean(want**2))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(of_one, got, want))))


def _held(
    title: str, runs: Mapping[str, Callable[[], Any]], want: Any
) -> dict[str, Callable[[], Any]]:
    """Those that give what is wanted."""
    held = {}
    for name, run in runs.items():
        try:
            off = float(_off(run(), want))
        except Exception as error:  # a compiler's, of any class
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            print(f"{title}: {name}: {reason:.200}")
            continue
        if not off < 1e-2:
            print(f"{title}: {name} is off by {off:.2g}; left out")
            continue
        held[name] = run
    return held


def _print(
    console: Console,
    title: str,
    seconds: Mapping[str, list[float]],
    rates: Mapping[str, list[float]],
    unit: str,
) -> None:
    table = Table("", "us", unit, title=title)
    for name in sorted(rates, key=lambda name: -median(rates[name])):
        table.add_row(name, f"{median(seconds[name]) * 1e6:.1f}", f"{median(rates[name]):,.0f}")
    console.print(table)


def _entries(
    name: str,
    claim: str,
    rates: Mapping[str, list[float]],
    unit: str,
    most: float,
    roof: str,
    clock: str,
    mislead: str,
) -> Iterator[Entry]:
    """Our fastest schedule beside the fastest of the others, if any of ours is right."""
    fastest = sorted(rates, key=lambda name: -median(rates[name]))
    ours = next((name for name in fastest if name.startswith(OURS)), None)
    if ours is None:
        return
    peers = [name for name in fastest if not name.startswith(OURS)]
    schedule = ours.removeprefix(OURS).strip()
    yield Entry(
        name=name, claim=claim, command=COMMAND, unit=unit,
        samples={OURS: rates[ours], **{peer: rates[peer] for peer in peers}},
        ratio=median(rates[ours]) / median(rates[peers[0]]),
        interval=ratio_interval(
            tuple(1 / x for x in rates[ours]), tuple(1 / x for x in rates[peers[0]])
        ),
        roofline=median(rates[ours]) / most, roof=roof,
        inputs=f"normal; in turns in one process, warm; seconds of the device: {clock}",
        mislead=f"the kernel asked for by name, with the schedule that was fastest in this run; "
        f"{mislead}; the ratio is to {peers[0]}",
        environment=environment(), extra={"schedule": schedule},
    )  # fmt: skip


if __name__ == "__main__":
    bench(Path(sys.argv[1]) if sys.argv[1:] else None, *sys.argv[2:3])
