"""A chain of small products on a GPU: launched one by one, or replayed as one graph.

A launch costs the host a few microseconds, and a kernel that takes less than its launch leaves the
GPU waiting. Both answers record the launches once and replay them: XLA turns parts of a program
into command buffers by itself, PyTorch captures a stream (`torch.cuda.CUDAGraph`, or
`reduce-overhead`). A captured graph reads and writes the addresses that it was captured with. Both
multiply at "high" precision, TF32 on a GPU: left alone, PyTorch takes all of float32's bits.

    python -m contrast.graphs               # each side in a process of its own; needs a GPU
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from contrast.show import table
from jaxinfra.errors import UserError

CLAIM = (
    "Whether small kernels are launched or replayed decides their speed; XLA decides by itself, "
    "PyTorch when it is told."
)
STEPS, N, TIMES = 64, 256, 100
OFF = "--xla_gpu_enable_command_buffer="
SIDES = {"jax": "", "jax-off": OFF, "torch": ""}


def chain(x: Any, w: Any) -> Any:
    """STEPS dependent products [N, N]; each is a kernel that no compiler fuses with the next."""
    for _ in range(STEPS):
        x = x @ w
    return x


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """x and an orthogonal w, so that products neither grow nor vanish."""
    rng = np.random.default_rng(0)
    w, _ = np.linalg.qr(rng.normal(size=(N, N)))
    return rng.normal(size=(N, N)).astype(np.float32), w.astype(np.float32)


def measure(call: Callable[[], Any], wait: Callable[[Any], Any], times: int = TIMES) -> dict:
    """Microseconds a call, one waited for at a time, and until it returned."""
    for _ in range(10):
        wait(call())
    wall, host = [], []
    for _ in range(times):
        begun = time.perf_counter()
        result = call()
        host.append(1e6 * (time.perf_counter() - begun))
        wait(result)
        wall.append(1e6 * (time.perf_counter() - begun))
    return {"wall": wall, "host": host, **launches(call, wait)}


def launches(call: Callable[[], Any], wait: Callable[[Any], Any]) -> dict:
    """Launches of kernels and of graphs that one call asks for, as Kineto sees them.

    It sees launches of graphs through the runtime, as PyTorch's are; XLA's go to the driver itself,
    and there a replay shows as kernels that nobody launched.
    """
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile
    except ModuleNotFoundError:
        return {}
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        wait(call())
    counts = {event.key: event.count for event in seen.key_averages()}
    graphs = sum(n for key, n in counts.items() if "GraphLaunch" in key)
    kernels = sum(n for key, n in counts.items() if "LaunchKernel" in key)
    return {"launches": {"kernels": kernels, "graphs": graphs}}


def jax_contestants() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """The chain in one jit; command buffers as XLA_FLAGS say."""
    import jax

    x, w = map(jax.numpy.asarray, inputs())
    jitted = jax.jit(chain)
    return {"jit": (lambda: jitted(x, w), jax.block_until_ready)}


def torch_contestants() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Eager everywhere; on a GPU also compiled, with reduced overhead, and captured by hand."""
    from contrast import peer

    torch = peer.torch()
    gpu = torch.cuda.is_available()
    x, w = (torch.tensor(a, device="cuda" if gpu else "cpu") for a in inputs())

    def wait(_: Any) -> None:
        if gpu:
            torch.cuda.synchronize()

    found: dict[str, Any] = {"eager": (lambda: chain(x, w), wait)}
    if not gpu:
        return found
    for name, mode in {"compiled": None, "reduce-overhead": "reduce-overhead"}.items():
        compiled = torch.compile(chain, mode=mode)
        found[name] = (lambda f=compiled: f(x, w), wait)
    found["captured"] = (captured(torch, x, w), wait)
    return found


def captured(torch: Any, x: Any, w: Any) -> Callable[[], Any]:
    """The chain captured in a CUDA graph; a call replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain(x, w)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, w)

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def child(side: str) -> dict[str, dict]:
    """What one process measures: {contestant: samples}; an error is told, not raised."""
    if side.startswith("jax"):
        import jax

        jax.config.update("jax_default_matmul_precision", "high")
        contestants = jax_contestants
    else:
        from contrast import peer

        peer.torch().set_float32_matmul_precision("high")
        contestants = torch_contestants
    found: dict[str, dict] = {}
    for name, (call, wait) in contestants().items():
        try:
            found[name] = measure(call, wait)
        except Exception as error:  # one way that fails must not cost the others
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return found


def run(sides: dict[str, str] = SIDES) -> dict[str, dict]:
    """Every side in its own process: {"JAX, jit": samples, ...}."""
    found = {}
    for side, flags in sides.items():
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags}".strip()
        done = subprocess.run(
            [sys.executable, "-m", "contrast.graphs", side], capture_output=True, text=True, env=env
        )
        if done.returncode:
            raise UserError(f"graphs: the process of {side} ended: {done.stderr[-500:]}")
        name = {"jax": "JAX", "jax-off": "JAX, no command buffers"}.get(side, "PyTorch")
        for way, samples in json.loads(done.stdout.splitlines()[-1]).items():
            found[f"{name}, {way}"] = samples
    return found


def main() -> dict[str, dict]:
    """Prints all ways; returns them."""
    print(CLAIM)
    found = run()
    rows = []
    for name, samples in found.items():
        if "error" in samples:
            rows.append([name, samples["error"], "", "", ""])
            continue
        counted = samples.get("launches", {})
        rows.append(
            [name, float(np.median(samples["wall"])), float(np.median(samples["host"])),
             counted.get("kernels", "—"), counted.get("graphs", "—")]
        )  # fmt: skip
    header = [
        f"{STEPS} products",
        "µs",
        "µs until it returned",
        "kernel launches",
        "graph launches",
    ]
    print(table(header, rows))
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(child(sys.argv[1])))
    else:
        main()
