"""The grouped product on one Hopper GPU: schedules of ours beside XLA's and cuBLAS's.

    python -m jaxinfra.kernels.grouped_bench [FOLDER [SHAPE]]

Contestants take turns in one process, by device time, on normal bfloat16 data in groups of uneven
sizes. Each is first held to products group by group, summed in float32; one that is wrong or that a
compiler refuses is named and left out. FOLDER gets the ledger's entries; SHAPE is one of SHAPES.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from jaxinfra.errors import UserError
from jaxinfra.hardware.detect import detect
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.measure.turns import device_turns
from pallas_kernels.grouped_matmul import Config, mosaic_gpu, mosaic_gpu_wgrad, supported, xla

FEW_GROUPS = 16  # of more, XLA would tune as many products of different sizes
FORWARD, ROWS, MATRICES = "forward", "gradient of rows", "gradient of matrices"
CONFIGS = {
    FORWARD: (Config(128, 192), Config(128, 192, band=16), Config(128, 128, slots=5)),
    ROWS: (Config(128, 192), Config(128, 192, band=16), Config(128, 128, slots=5)),
    MATRICES: (Config(128, 192), Config(128, 192, band=16), Config(128, 128, slots=5)),
}
# Which of XLA's own products is fastest takes it minutes to find for groups of many sizes.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Shape:
    """M rows of K numbers in G groups, whose matrices have N columns."""

    name: str
    M: int
    K: int
    N: int
    G: int

    @property
    def flops(self) -> int:
        """Those of a pass."""
        return 2 * self.M * self.K * self.N

    def counts(self) -> np.ndarray:
        """Sizes of groups: shares of a flat Dirichlet distribution mixed with equal ones."""
        rng = np.random.default_rng(0)
        shares = (rng.dirichlet(np.full(self.G, 1.0)) + 1 / self.G) / 2
        return rng.multinomial(self.M, shares).astype(np.int32)

    def make(self) -> tuple[Array, Array, Array, Array]:
        """x, w, the cotangent of the product, and counts."""
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = ((self.M, self.K), (self.G, self.K, self.N), (self.M, self.N))
        x, w, dy = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )
        return x, w, dy, jnp.asarray(self.counts())


SHAPES = (
    Shape("qwen3-30b-a3b", 65536, 2048, 768, 128),
    Shape("mixtral", 16384, 4096, 14336, 8),
)


def bench(out: Path | None, only: str | None = None) -> None:
    """Prints a table for each shape and pass; with `out`, a folder, writes the ledger's entries."""
    if reason := supported("mosaic_gpu", jnp.bfloat16):
        raise UserError(f"grouped_bench: {reason}")
    console = Console(width=110)
    console.print(f"uneven groups, empty ones and NaN behind them: {_ragged()}")
    for shape in (shape for shape in SHAPES if only in (None, shape.name)):
        x, w, dy, counts = shape.make()
        for of_pass, arrays in (
            (FORWARD, (x, w, counts)), (ROWS, (dy, w, counts)), (MATRICES, (x, dy, counts))
        ):  # fmt: skip
            runs = _held(shape, of_pass, arrays)
            if not runs:
                continue
            seconds, clock = device_turns(runs, rounds=2, calls=4)
            rates = {n: [shape.flops / s / 1e12 for s in taken] for n, taken in seconds.items()}
            table = Table("", "us", "TFLOP/s", title=f"{shape.name}, {of_pass}")
            for name in sorted(rates, key=lambda name: -median(rates[name])):
                row = f"{median(seconds[name]) * 1e6:.0f}", f"{median(rates[name]):.0f}"
                table.add_row(name, *row)
            console.print(table)
            entry = _entry(shape, of_pass, rates, clock)
            if out is not None and entry is not None:
                write(entry, out)


def _ours(of_pass: str, config: Config) -> Callable[..., Any]:
    if of_pass == MATRICES:
        return partial(mosaic_gpu_wgrad.wgrad, config=config)
    return partial(mosaic_gpu.grouped_matmul, config=config, transpose_w=of_pass == ROWS)


def _contestants(shape: Shape, of_pass: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for c in CONFIGS[of_pass]:
        name = f"jaxinfra {c.tile_m}x{c.tile_n}x{c.tile_k} x{c.slots} band {c.band}"
        yield name, _ours(of_pass, c)
    if of_pass == MATRICES:
        yield "XLA ragged_dot", xla.wgrad
    else:
        yield "XLA ragged_dot", partial(xla.grouped_matmul, transpose_w=of_pass == ROWS)
    if shape.G <= FEW_GROUPS:
        yield "cuBLAS, a product a group", partial(_loop, of_pass, shape.counts())
    if importlib.util.find_spec("tokamax"):
        yield "tokamax mosaic", partial(_tokamax, of_pass)


def _loop(of_pass: str, counts: np.ndarray, a: Array, b: Array, _: Array) -> Array:
    """As many dense products as groups, whose sizes are known to the compiler."""
    ends = np.cumsum(counts)
    spans = [slice(int(end - count), int(end)) for end, count in zip(ends, counts, strict=True)]
    if of_pass == MATRICES:
        return jnp.stack([a[span].T @ b[span] for span in spans])
    matrices = [b[g].T if of_pass == ROWS else b[g] for g in range(len(counts))]
    return jnp.concatenate([a[span] @ w for span, w in zip(spans, matrices, strict=True)])


def _tokamax(of_pass: str, a: Array, b: Array, counts: Array) -> Array:
    import tokamax  # pyright: ignore[reportMissingImports]

    ragged_dot = partial(tokamax.ragged_dot, group_sizes=counts, implementation="mosaic")
    if of_pass == FORWARD:
        return ragged_dot(a, b)
    if of_pass == ROWS:
        x = jnp.zeros((a.shape[0], b.shape[1]), a.dtype)
        return jax.vjp(lambda x: ragged_dot(x, b), x)[1](a)[0]
    w = jnp.zeros((counts.shape[0], a.shape[1], b.shape[1]), a.dtype)
    return jax.vjp(lambda w: ragged_dot(a, w), w)[1](b)[0]


@partial(jax.jit, static_argnums=0)
def _wanted(of_pass: str, a: Array, b: Array, counts: Array) -> Array:
    """Each group's product of all rows, of which its own are taken, summed in float32."""
    ends, row = jnp.cumsum(counts), jnp.arange(a.shape[0])[:, None]

    def mine(g):
        return (ends[g] - counts[g] <= row) & (row < ends[g])

    if of_pass == MATRICES:

        def of_group(g):
            left, right = (jnp.where(mine(g), x, jnp.zeros((), x.dtype)) for x in (a, b))
            return jnp.einsum("mk,mn->kn", left, right, preferred_element_type=jnp.float32)

        return jax.lax.map(of_group, jnp.arange(counts.shape[0]))
    letters = "mk,nk->mn" if of_pass == ROWS else "mk,kn->mn"

    def add(g, out):
        product = jnp.einsum(letters, a, b[g], preferred_element_type=jnp.float32)
        return jnp.where(mine(g), product, out)

    out = jnp.zeros((a.shape[0], b.shape[1 if of_pass == ROWS else 2]), jnp.float32)
    return jax.lax.fori_loop(0, counts.shape[0], add, out)


@jax.jit
def _off(got: Array, want: Array) -> Array:
    """The larger of two differences: of means, and of the largest, as shares of what is wanted."""
    off = jnp.abs(got.astype(jnp.float32) - want)
    mean = jnp.sqrt(jnp.mean(off**2) / jnp.mean(want**2))
    return jnp.maximum(mean, jnp.max(off) / jnp.max(jnp.abs(want)))


def _held(
    shape: Shape, of_pass: str, arrays: tuple[Array, Array, Array]
) -> dict[str, Callable[[], Any]]:
    """Those that give what is wanted, compiled."""
    want, runs = _wanted(of_pass, *arrays), {}
    for name, of in _contestants(shape, of_pass):
        options = CUBLAS if name.startswith("cuBLAS") else None
        run = partial(jax.jit(of, compiler_options=options), *arrays)
        try:
            off = float(_off(run(), want))
        except Exception as error:  # a compiler's, of any class
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            print(f"{shape.name}, {of_pass}: {name}: {reason:.200}")
            continue
        if not off < 1e-2:
            print(f"{shape.name}, {of_pass}: {name} is off by {off:.2g}; left out")
            continue
        runs[name] = run
    return runs


def _ragged() -> Mapping[str, str]:
    """How far the default schedule is off where edges of every kind are, NaN behind the groups."""
    counts = np.asarray([3, 130, 0, 1, 64, 200, 7, 0, 301], np.int32)
    rows = Shape("ragged", 1000, 256, 448, len(counts))
    x, w, dy, _ = rows.make()
    behind = (np.arange(rows.M) >= counts.sum())[:, None]
    x, dy = (jnp.where(behind, jnp.nan, a).astype(a.dtype) for a in (x, dy))
    found = {}
    for of_pass, a, b in ((FORWARD, x, w), (ROWS, dy, w), (MATRICES, x, dy)):
        arrays = a, b, jnp.asarray(counts)
        try:
            off = float(_off(jax.jit(_ours(of_pass, Config()))(*arrays), _wanted(of_pass, *arrays)))
            found[of_pass] = f"off by {off:.2g}" + ("" if off < 1e-2 else ", WRONG")
        except Exception as error:  # a compiler's, of any class
            found[of_pass] = (str(error).strip() or repr(error)).splitlines()[0][:200]
    return found


def _entry(shape: Shape, of_pass: str, rates: dict[str, list[float]], clock: str) -> Entry | None:
    """Our fastest schedule beside the fastest of the others."""
    fastest = sorted(rates, key=lambda name: -median(rates[name]))
    ours = next((name for name in fastest if name.startswith("jaxinfra")), None)
    peers = [name for name in fastest if not name.startswith("jaxinfra")]
    if ours is None or not peers:
        return None
    peak = detect().flops["bfloat16"]
    assert peak is not None
    return Entry(
        name=f"grouped-matmul-{shape.name}-{of_pass.replace(' ', '-')}",
        claim=f"Grouped product, {of_pass}: {shape.M:,} rows, {shape.G} groups of "
        f"{shape.K:,} x {shape.N:,}, bfloat16",
        command="python -m jaxinfra.kernels.grouped_bench",
        unit="TFLOP/s",
        samples={"jaxinfra": rates[ours], **{name: rates[name] for name in peers}},
        ratio=median(rates[ours]) / median(rates[peers[0]]),
        interval=ratio_interval(
            tuple(1 / x for x in rates[ours]), tuple(1 / x for x in rates[peers[0]])
        ),
        roofline=median(rates[ours]) * 1e12 / peak,
        roof=f"{peak / 1e12:.0f} TFLOP/s bfloat16 on paper",
        inputs="normal; sizes of groups are half equal shares, half those of a flat Dirichlet "
        f"distribution; {ours.removeprefix('jaxinfra ')}; seconds of the device: {clock}",
        mislead=f"the kernel asked for by name, with the schedule that was fastest in this run; "
        f"the ratio is to {peers[0]}, the fastest of the others",
        environment=environment(),
        extra={"schedule": ours.removeprefix("jaxinfra ")},
    )  # fmt: skip


if __name__ == "__main__":
    bench(Path(sys.argv[1]) if sys.argv[1:] else None, *sys.argv[2:3])
