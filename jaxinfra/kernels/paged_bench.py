"""Attention over pages on one NVIDIA GPU: every implementation beside the memory's copy bandwidth.

Contestants take turns in one process, by device time, on normal bfloat16 data in pages that lie in
random order, as a served pool's do. Each is first held to the reference; one that is wrong or that
the compiler refuses is named and left out. What counts are the keys and values that the queries
see, once a key head, over the time: a kernel that reads dead pages or reads pages twice shows it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxinfra.errors import UserError
from jaxinfra.hardware.detect import here
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.measure.turns import device_turns
from pallas_kernels.paged_attention import mosaic_gpu, paged_attention, reference, triton

PAGE, N, K, H = 16, 16, 8, 128  # Qwen3-0.6B's heads
PEER = "xla"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of `queries` new tokens each, whose lengths are drawn between two numbers."""

    name: str
    rows: int
    queries: int
    shortest: int
    longest: int
    dense: bool = True  # whether XLA's gather of all pages fits and is worth the wait

    def make(self) -> dict[str, Any]:
        """The arguments of `paged_attention`."""
        rng = np.random.default_rng(0)
        lengths = rng.integers(self.shortest, self.longest + 1, self.rows).astype(np.int32)
        M = -(-self.longest // PAGE)
        table = rng.permutation(self.rows * M).astype(np.int32).reshape(self.rows, M)
        starts = np.arange(self.rows + 1, dtype=np.int32) * self.queries
        keys = jax.random.split(jax.random.key(0), 3)
        pages = (self.rows * M, K, PAGE, H)
        shapes = ((self.rows * self.queries, N, H), pages, pages)
        q, k, v = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )
        return {"q": q, "k_pages": k, "v_pages": v, "page_table": jnp.asarray(table),
                "starts": jnp.asarray(starts), "lengths": jnp.asarray(lengths)}  # fmt: skip


SHAPES = (
    Shape("decode-256-to-2k", 256, 1, 100, 2048),
    Shape("decode-1-at-16k", 1, 1, 16384, 16384),
    Shape("decode-16-at-16k", 16, 1, 16384, 16384),
    Shape("chunks-8x256-to-4k", 8, 256, 1024, 4096, dense=False),
)
_TRITON = {
    f"triton {c.split} {c.tile // 256} w{c.warps} s{c.stages}": c
    for c in (
        triton.Config(),
        triton.Config(stages=3),
        triton.Config(stages=4),
        triton.Config(tile=2**13, warps=2, stages=3),
        triton.Config(tile=2**13, warps=4, stages=4),
        triton.Config(tile=2**15, warps=8, stages=3),
        triton.Config(tile=2**15, warps=4, stages=2),
        triton.Config(split=256, stages=3),
        triton.Config(split=1024, stages=3),
    )
}
_MOSAIC = {
    f"mosaic_gpu {c.split} x{c.slots}": c
    for c in (mosaic_gpu.Config(), mosaic_gpu.Config(slots=4), mosaic_gpu.Config(1024, 4))
}


def bench(out: Path | None) -> None:
    """Prints a table a shape; with `out`, a folder, also writes the ledger's entries."""
    if jax.default_backend() != "gpu":
        raise UserError("kernels bench paged: no NVIDIA GPU here")
    console = Console(width=110)
    bandwidth = here().bandwidth
    for shape in SHAPES:
        table = Table("", "us", "GB/s", f"of {bandwidth / 1e12:.2f} TB/s", title=shape.name)
        arguments = shape.make()
        moved = _moved(arguments)
        seconds, clock = device_turns(_held(shape, arguments), rounds=2, calls=5)
        for name, taken in sorted(seconds.items(), key=lambda pair: median(pair[1])):
            rate = moved / median(taken)
            table.add_row(
                name, f"{median(taken) * 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / bandwidth:.2f}"
            )
        console.print(table)
        entry = _entry(shape, seconds, moved, bandwidth, clock)
        if out is not None and entry is not None:
            write(entry, out)


def _moved(arguments: dict[str, Any]) -> int:
    """Bytes of keys and values that the rows hold."""
    return int(np.sum(np.asarray(arguments["lengths"]))) * 2 * K * H * 2


def _contestants(shape: Shape) -> Iterator[tuple[str, Callable[..., Any]]]:
    yield "chosen", paged_attention
    for name, config in _TRITON.items():
        yield name, partial(triton.paged_attention, config=config)
    for name, config in _MOSAIC.items():
        yield name, partial(mosaic_gpu.paged_attention, config=config)
    if shape.dense:
        yield PEER, partial(paged_attention, implementation="xla")


def _held(shape: Shape, arguments: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Those that give what the reference gives on a part of the rows, compiled."""
    want = _reference(arguments)
    runs = {}
    for name, of in _contestants(shape):
        call = partial(jax.jit(partial(of, scale=H**-0.5)), **arguments)
        try:
            got = np.asarray(call(), np.float32)
        except Exception as error:  # a compiler's, of any class
            print(f"{shape.name}: {name}: {str(error).strip().splitlines()[0]:.100}")
            continue
        off = np.linalg.norm(got[: len(want)] - want) / np.linalg.norm(want)
        if not off < 1e-2:
            print(f"{shape.name}: {name} is off by {off:.2g}; left out")
            continue
        runs[name] = call
    return runs


def _reference(arguments: dict[str, Any]) -> np.ndarray:
    """What the first rows give, in float32."""
    few = min(4, arguments["lengths"].shape[0])
    starts = arguments["starts"][: few + 1]
    few_queries = {
        "q": arguments["q"][: int(starts[-1])].astype(jnp.float32), "starts": starts,
        "page_table": arguments["page_table"][:few], "lengths": arguments["lengths"][:few],
    }  # fmt: skip
    whole = {name: arguments[name].astype(jnp.float32) for name in ("k_pages", "v_pages")}
    with jax.default_matmul_precision("highest"):
        return np.asarray(reference.paged_attention(**few_queries, **whole, scale=H**-0.5))


def _entry(
    shape: Shape, seconds: dict[str, list[float]], moved: int, bandwidth: float, clock: str
) -> Entry | None:
    rates = {name: [moved / s / 1e9 for s in taken] for name, taken in seconds.items()}
    ours = rates.pop("chosen", None)
    if ours is None:
        return None
    peer = rates.pop(PEER, None)
    return Entry(
        name=f"paged-attention-{shape.name}",
        claim=f"Paged attention, {shape.rows} rows of {shape.queries} queries over "
        f"{shape.shortest:,} to {shape.longest:,} tokens, heads 16/8 of 128, bfloat16",
        command="python -m jaxinfra.kernels.paged_bench",
        unit="GB/s",
        samples={"jaxinfra": ours} | ({"XLA": peer} if peer else {}),
        ratio=median(ours) / median(peer) if peer else None,
        interval=ratio_interval(
            tuple(1 / x for x in ours), tuple(1 / x for x in peer)
        ) if peer else None,
        roofline=median(ours) * 1e9 / bandwidth,
        roof=f"{bandwidth / 1e12:.2f} TB/s of copy bandwidth measured in this run",
        inputs=f"normal, pages of {PAGE} in random order; seconds of the device: {clock}",
        mislead="bytes are those of live keys and values; pages stay in the L2 cache between calls "
        "where they fit into it",
        environment=environment(),
        extra={"GB/s of each schedule (keys a split, keys a tile, warps, stages)":
               {name: round(median(rate), 1) for name, rate in rates.items()}},
    )  # fmt: skip


if __name__ == "__main__":
    bench(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
