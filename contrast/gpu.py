"""All contrasts that need a GPU, in one command that writes entries of the ledger.

    python -m contrast.gpu benchmarks/results        # about two minutes on one H200

Replayed graphs, host cost, running ahead, fusion, one Triton kernel from both, errors of products,
and the allocator's holes. A part that fails says so, and the others go on; on a CPU what needs a
GPU is skipped. Device seconds are CUPTI's for both frameworks, for CUPTI sees a process, not a
framework.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the memory

import jax
import jax.numpy as jnp

from contrast import dispatch, fusion, graphs, memory, one_triton_source, peer, precision
from contrast.show import table
from jaxinfra.hardware import detect
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.measure.device_time import device_seconds

COMMAND = "python -m contrast.gpu benchmarks/results"
Samples = Mapping[str, list[float]]


def entry(name: str, claim: str, unit: str, samples: Samples, **told: Any) -> Entry:
    """An entry whose ratio is of the first contestant to the second, where both have samples."""
    first, second = [*samples.values(), [], []][:2]
    pairs = min(len(first), len(second))
    ratio = interval = None
    if pairs >= 5:
        ratio = median(second) / median(first)
        interval = ratio_interval(first[:pairs], second[:pairs])
    return Entry(
        name=f"contrast-{name}", claim=claim, command=COMMAND, unit=unit, samples=samples,
        ratio=ratio, interval=interval, roofline=told.pop("roofline", None),
        roof=told.pop("roof", "none: the host's cost, or an error"), environment=environment(),
        **told,
    )  # fmt: skip


def replayed() -> Entry:
    """64 small products: launched or replayed."""
    found = graphs.run()
    good = {name: s for name, s in found.items() if "wall" in s}
    order = ["JAX, jit", "PyTorch, captured", "PyTorch, eager"]
    names = [*[n for n in order if n in good], *[n for n in good if n not in order]]
    return entry(
        "small-kernels", "64 dependent products of 256 x 256, TensorFloat-32: JAX, jit", "µs",
        {name: good[name]["wall"] for name in names},
        inputs="a normal and an orthogonal matrix; each framework in a process of its own",
        mislead="the processes ran one after the other, not in turns; Kineto does not show the "
        "driver's own launch of a graph, which XLA uses",
        extra={
            "µs until the call returned": {n: median(good[n]["host"]) for n in names},
            "launches": {n: good[n].get("launches") for n in names},
            "failed": {n: s["error"] for n, s in found.items() if "error" in s},
        },
    )  # fmt: skip


def host_cost() -> Entry:
    """What 16 small operations cost the host."""
    samples: dict[str, list[float]] = {}
    for side in (dispatch.jax_side(), dispatch.torch_side()):
        for name, values in dispatch.host_cost(side).items():
            samples[f"{side.name}, {name}"] = values
    order = ["JAX, compiled", "PyTorch, compiled", "JAX, as written", "PyTorch, as written"]
    return entry(
        "host-cost", "Until a call of 16 small operations returned: JAX, compiled", "µs",
        {name: samples[name] for name in order},
        inputs="a chain of multiplications and additions of an 8 x 8 matrix",
        mislead="PyTorch's compiled chain replays a CUDA graph and copies its input; a model's "
        "call has many arguments, and both frameworks pay for each of them",
    )  # fmt: skip


def ahead(n: int, steps: int, large: int) -> Entry:
    """How far Python runs ahead, and what reading a value costs."""
    torch = peer.torch()
    torch.set_float32_matmul_precision("high")  # what JAX takes by default
    samples: dict[str, list[float]] = {}
    depth: dict[str, Any] = {}
    for side in (dispatch.jax_side(), dispatch.torch_side()):
        for _ in range(7):
            for name, value in dispatch.run_ahead(side, n, steps).items():
                samples.setdefault(f"{side.name}, {name}", []).append(value)
        queued, ms = dispatch.queue_depth(side, large)
        depth[side.name] = {"calls queued before one waited": queued, "behind a product of ms": ms}
    torch.set_float32_matmul_precision("highest")
    first = ["JAX, until done", "JAX, until done, a value read each step"]
    samples = {name: samples[name] for name in [*first, *(n for n in samples if n not in first)]}
    return entry(
        "run-ahead",
        f"{steps} dependent products of {n:,} cubed, TensorFloat-32: JAX, no value read", "ms",
        samples, inputs=f"every number 1 / {n}",
        mislead="the ratio is of reading no value to reading one each step within JAX, not of the "
        "two frameworks; taking one number of an array is an operation in itself, dearer in JAX; "
        "constant inputs draw less power than random ones",
        extra={"queue": depth},
    )  # fmt: skip


def fused(T: int, D: int) -> Entry:
    """Device time of a chain that is bound by memory, fused and not."""
    torch = peer.compile_afresh()
    x, g = jax.random.normal(jax.random.key(0), (T, D), jnp.bfloat16), jnp.ones(D, jnp.bfloat16)
    lib = type("", (), {"rsqrt": jax.lax.rsqrt, "exp": jnp.exp})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    y = torch.randn(T, D, dtype=torch.bfloat16, device=device)
    h = torch.ones(D, dtype=torch.bfloat16, device=device)

    def in_torch(y: Any, h: Any) -> Any:
        return fusion.gated_norm(torch, y, h)

    jitted = jax.jit(lambda x, g: fusion.gated_norm(lib, x, g))
    compiled = torch.compile(in_torch)
    calls: dict[str, Callable[[], Any]] = {
        "XLA": lambda: jitted(x, g),
        "Inductor (Triton)": lambda: compiled(y, h),
        "JAX, operation by operation": lambda: fusion.gated_norm(lib, x, g),
        "PyTorch, eager": lambda: in_torch(y, h),
    }
    samples, method = {}, ""
    for name, call in calls.items():
        wait = jax.block_until_ready if name.startswith(("XLA", "JAX")) else _torch_wait
        for _ in range(3):
            wait(call())
        seconds, method = device_seconds(call, lambda: (), 20, wait, time.perf_counter)
        samples[name] = [1e6 * s for s in seconds] or _walls(call, wait)
    chip = detect.here()
    least = 2 * (2 * T * D + D) / chip.bandwidth
    return entry(
        "fusion", f"silu(rms_norm(x) g) of {T:,} x {D:,}, bfloat16: XLA", "µs", samples,
        roofline=1e6 * least / median(samples["XLA"]),
        roof=f"{chip.bandwidth / 1e12:.2f} TB/s of copy bandwidth measured in this run",
        inputs=f"normal; seconds of the device: {method}",
        mislead="the sum of a call's kernels, without the gaps between them, which cost the "
        "unfused chains more; intermediate results of bfloat16 are rounded where they are written",
    )  # fmt: skip


def _torch_wait(_: Any) -> None:
    torch = peer.torch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _walls(call: Callable, wait: Callable) -> list[float]:
    found = []
    for _ in range(5):
        begun = time.perf_counter()
        wait(call())
        found.append(1e6 * (time.perf_counter() - begun))
    return found


def triton() -> Entry:
    """The same Triton source from both."""
    found = one_triton_source.main()
    keys = "samples, µs of the device", "samples, µs until the call returned"
    timed: dict[str, Any] = {side: found[side] for side in ("JAX", "PyTorch")}
    samples = {side: list(facts[keys[0]]) for side, facts in timed.items()}
    M, N, K = one_triton_source.SHAPE
    return entry(
        "triton-source", f"One Triton matmul, {M:,} x {N:,} x {K:,}, bfloat16: from JAX", "µs",
        samples, roof="none: the same kernel",
        inputs="normal; seconds of the device by CUPTI",
        mislead="the kernel is not the fastest here (see the matmul ladder); jax-triton and "
        "PyTorch compile it apart, with the same triton",
        extra={
            "µs until the call returned": {s: median(f[keys[1]]) for s, f in timed.items()},
            "bits of the result": {s: f["bits of the result"] for s, f in timed.items()},
        },
    )  # fmt: skip


def errors() -> Entry:
    """ULPs of a float32 product by each default and name."""
    torch = peer.torch()
    sides = {
        "JAX": precision.in_jax(),
        "PyTorch": precision.in_torch("cuda" if torch.cuda.is_available() else "cpu"),
    }
    samples = {
        f"{side}, {row.removesuffix(': ULP')}": [value]
        for side, facts in sides.items()
        for row, value in facts.items()
        if isinstance(value, float)
    }
    return entry(
        "precision", "Error of a float32 product [64, 512] x [512, 64]: JAX, by default", "ULP",
        samples,
        inputs="normal, seed 0; against float64, root mean square, in ULPs of float32 at the "
        "values' own RMS",
        mislead="one shape and one seed; the algorithm chosen for another shape may differ",
        extra={side: {k: str(v) for k, v in f.items()} for side, f in sides.items()},
    )  # fmt: skip


def holes() -> Entry:
    """What fragmentation costs the caching allocator."""
    found: dict[str, Any] = dict(memory.fragmentation())
    return entry(
        "allocator", "Taken from the driver for half of what lies free in holes: PyTorch", "MiB",
        {"PyTorch's allocator, taken anew": [found["MiB taken from the driver for it"]]},
        inputs="64 blocks of 1 MiB, every second freed, then one request", roof="none: bytes",
        mislead="a pattern made to leave holes; XLA's allocator was not asked, a jitted program "
        "asks once for all it needs",
        extra=found,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs every part; the exit status is the number of parts that failed."""
    parser = argparse.ArgumentParser(prog="python -m contrast.gpu")
    parser.add_argument("out", help="folder of the entries")
    out = parser.parse_args(argv).out
    peer.torch()  # its version belongs to the conditions of every entry
    gpu = jax.default_backend() == "gpu"
    parts: dict[str, Callable[[], Entry]] = {
        "replayed graphs": replayed,
        "host cost": host_cost,
        "run-ahead": lambda: ahead(4096, 50, 24576) if gpu else ahead(256, 10, 512),
        "fusion": lambda: fused(16384, 4096) if gpu else fused(64, 256),
        "precision": errors,
    }
    if gpu:
        parts |= {"one Triton source": triton, "allocator": holes}
    rows, failed = [], 0
    for name, part in parts.items():
        begun = time.perf_counter()
        try:
            made = part()
        except Exception:
            failed += 1
            print(f"{name}: failed\n{traceback.format_exc()}", file=sys.stderr)
            continue
        write(made, out)
        for who, values in made.samples.items():
            rows.append([made.name, who, float(median(values)), made.unit])
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        if made.extra:
            print(f"  {dict(made.extra)}", file=sys.stderr)
    print(table(["entry", "who", "median", ""], rows))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
