"""One Triton kernel, launched from JAX and from PyTorch: the same machine code, two hosts.

`pallas_kernels/matmul/triton_source.py` knows neither framework. PyTorch launches it where Python
calls it, on the current stream, into tensors that exist. JAX compiles it when it lowers the
program, and XLA launches it as one of the program's own kernels, into buffers of its plan. So the
device takes as long, and the host differs: for one kernel, Triton's launcher from PyTorch costs
less than the call of a jitted program; of many kernels, the program is still one call. Neither
framework can derive it.

    python -m contrast.one_triton_source    # on a GPU; on a CPU PyTorch's side is interpreted
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from contrast import peer
from contrast.show import Facts, side_by_side
from jaxinfra.errors import UserError
from jaxinfra.measure.device_time import device_seconds
from pallas_kernels.matmul import triton as from_jax

CLAIM = "A Triton kernel is the same to the device whoever launches it; what a launch costs is not."
SHAPE = (2048, 2048, 2048)  # M, N, K on a GPU
SMALL = (70, 50, 40)  # interpreted


def matrices(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """a [M, K] and b [K, N], normal."""
    (M, N, K), rng = shape, np.random.default_rng(0)
    return rng.normal(size=(M, K)).astype(np.float32), rng.normal(size=(K, N)).astype(np.float32)


def torch_matmul(a: Any, b: Any, tiles: from_jax.Tiles) -> Any:
    """a [M, K] @ b [K, N] of 16-bit PyTorch tensors, by this project's Triton source."""
    source = peer.load("pallas_kernels.matmul.triton_source")
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    count = -(-M // tiles.block_m) * -(-N // tiles.block_n)
    source.matmul[(count,)](
        a, b, out, M=M, N=N, K=K, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k, GROUP=tiles.group, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def relative_error(found: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Largest error over the largest value, against float64."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def in_jax(shape: tuple[int, int, int] = SHAPE) -> Facts:
    """Seconds and error of the kernel in a jitted program; UserError where there is no GPU."""
    if reason := from_jax.refusal(platform=jax.default_backend(), dtype=jax.numpy.bfloat16):
        raise UserError(reason)
    (M, N, _), (a, b) = shape, matrices(shape)
    x, y = (jax.numpy.asarray(m, jax.numpy.bfloat16) for m in (a, b))
    call = jax.jit(from_jax.matmul)
    tiles = from_jax.tiles(M, N)
    return _facts(lambda: call(x, y), jax.block_until_ready, x, y, tiles)


def in_torch(shape: tuple[int, int, int] = SHAPE) -> Facts:
    """The same from PyTorch; on a CPU Triton interprets a small product, and nothing is timed."""
    torch = peer.torch()
    if not torch.cuda.is_available():
        return {"largest error over the largest value": interpreted()}
    (M, N, _), (a, b) = shape, matrices(shape)
    x, y = (torch.tensor(m, device="cuda", dtype=torch.bfloat16) for m in (a, b))
    tiles = from_jax.tiles(M, N)
    return _facts(
        lambda: torch_matmul(x, y, tiles), lambda _: torch.cuda.synchronize(), x, y, tiles
    )


def _facts(call: Callable[[], Any], wait: Callable, a: Any, b: Any, tiles: Any) -> Facts:
    def array(x: Any) -> np.ndarray:
        return np.asarray((x.float().cpu() if hasattr(x, "cpu") else x), np.float32)

    out = call()
    wait(out)
    host = []
    for _ in range(100):
        begun = time.perf_counter()
        held = call()
        host.append(1e6 * (time.perf_counter() - begun))
        wait(held)
    device, method = device_seconds(call, lambda: (), 20, wait, time.perf_counter)
    return {
        "largest error over the largest value": relative_error(array(out), array(a), array(b)),
        "tiles": f"{tiles.block_m} x {tiles.block_n} x {tiles.block_k}",
        "bits of the result": _digest(array(out)),
        "µs of the device": float(1e6 * np.median(device)),
        "µs until the call returned": float(np.median(host)),
        "clock": method,
        "samples, µs of the device": [1e6 * s for s in device],
        "samples, µs until the call returned": host,
    }


def _digest(array: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(array.tobytes()).hexdigest()[:12]


def interpreted() -> float:
    """The error of a small product by PyTorch's side, in a process where Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "contrast.one_triton_source", "interpret"],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"Triton's interpreter: {(done.stderr.splitlines() or ['?'])[-1]}")
    return float(done.stdout.splitlines()[-1])


def _interpret() -> float:
    import torch
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        """triton 3.6 takes an array of one number for a number; numpy 2.4 no longer does."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
    a, b = matrices(SMALL)
    x, y = (torch.tensor(m).half() for m in (a, b))
    out = torch_matmul(x, y, from_jax.Tiles(32, 16, 32, 2, 4, 2))
    return relative_error(out.float().numpy(), x.float().numpy(), y.float().numpy())


def main() -> dict[str, Facts]:
    """Prints both; returns them, samples left out of the table."""
    found: dict[str, Facts] = {}

    def side(name: str, run: Callable[[], Facts]) -> Callable[[], Facts]:
        def shown() -> Facts:
            found[name] = run()
            return {k: v for k, v in found[name].items() if not k.startswith("samples")}

        return shown

    side_by_side(CLAIM, {"JAX": side("JAX", in_jax), "PyTorch": side("PyTorch", in_torch)})
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["interpret"]:
        print(_interpret())
    else:
        main()
