"""What a call costs before the device works, and how far Python may run ahead of it.

Both frameworks return at once with arrays that are not filled yet (PyTorch on a GPU only: on a CPU
its operations are done when they return). While the device is slower than Python, the cost of a
call is hidden; where it is faster, it is all one sees. A jitted function is one call whatever it
holds; operation by operation, each costs. Whoever reads a value, `float(loss)`, waits, and the
queue runs dry.

    python -m contrast.dispatch             # on a GPU if there is one
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrast import peer
from contrast.show import Facts, side_by_side

CLAIM = (
    "A call costs microseconds of Python whatever it computes: one for a whole jitted program, "
    "one for each operation without; reading a value stops the queue."
)
OPERATIONS = 16  # of the chain; each is small
CALLS = 200


@dataclasses.dataclass(frozen=True)
class Framework:
    """The same few things of either framework."""

    name: str
    make: Callable[[int], Any]  # [n, n], each number 1 / n
    product: Callable[[Any], Any]  # x [n, n] -> x @ x, which is x again
    chain: Callable[[Any], Any]  # OPERATIONS small operations, as written
    compiled_chain: Callable[[Any], Any]
    wait: Callable[[Any], Any]


def chain(x: Any) -> Any:
    """OPERATIONS operations, each of its own."""
    for _ in range(OPERATIONS // 2):
        x = x * 0.5
        x = x + 1.0
    return x


def jax_side() -> Framework:
    """JAX: jitted, and operation by operation."""
    return Framework(
        "JAX",
        lambda n: jnp.full((n, n), 1 / n, jnp.float32),
        jax.jit(lambda x: x @ x),
        chain,
        jax.jit(chain),
        jax.block_until_ready,
    )


def torch_side() -> Framework:
    """PyTorch: eager, and compiled as CUDA graphs on a GPU, by Dynamo alone on a CPU."""
    torch = peer.torch()
    gpu = torch.cuda.is_available()
    compiled = torch.compile(chain, mode="reduce-overhead" if gpu else None,
                             backend="inductor" if gpu else "eager")  # fmt: skip
    return Framework(
        "PyTorch",
        lambda n: torch.full((n, n), 1 / n, device="cuda" if gpu else "cpu"),
        lambda x: x @ x,
        chain,
        compiled,
        lambda _: torch.cuda.synchronize() if gpu else None,
    )


def seconds_to_return(call: Callable[[], Any], wait: Callable[[Any], Any], times: int) -> list:
    """Seconds until `call` returned, with nothing else queued."""
    found = []
    for i in range(times + 20):  # the first compile and warm up
        begun = time.perf_counter()
        result = call()
        returned = time.perf_counter()
        wait(result)
        if i >= 20:
            found.append(returned - begun)
    return found


def host_cost(framework: Framework, times: int = CALLS) -> dict[str, list[float]]:
    """Microseconds of Python for the chain, as written and compiled."""
    x = framework.make(8)
    framework.wait(x)
    calls = {"as written": framework.chain, "compiled": framework.compiled_chain}
    return {
        name: [1e6 * s for s in seconds_to_return(lambda f=f: f(x), framework.wait, times)]
        for name, f in calls.items()
    }


def run_ahead(framework: Framework, n: int, steps: int) -> dict[str, float]:
    """Milliseconds of `steps` products [n, n]: until queued, until done, and reading a value each.

    The value is one number of the product, as a training loop reads its loss.
    """

    def timed(read: bool) -> tuple[float, float]:
        x = framework.make(n)
        framework.wait(x)
        begun = time.perf_counter()
        for _ in range(steps):
            x = framework.product(x)
            if read:
                float(x[0, 0])
        returned = time.perf_counter()
        framework.wait(x)
        return 1e3 * (returned - begun), 1e3 * (time.perf_counter() - begun)

    for read in (False, True):
        timed(read)  # warms up
    queued, done = timed(read=False)
    _, reading = timed(read=True)
    return {
        "until queued": queued,
        "until done": done,
        "until done, a value read each step": reading,
    }


def queue_depth(framework: Framework, n: int, most: int = 4096) -> tuple[int | None, float]:
    """Small operations that could be queued behind one product [n, n], and its milliseconds.

    The first call that takes a fifth of the product's time had to wait. None: `most` fit in.
    """
    large, small = framework.make(n), framework.make(8)
    for x in (large, small):
        framework.wait(framework.product(x))
    begun = time.perf_counter()
    framework.wait(framework.product(large))
    whole = time.perf_counter() - begun
    held = framework.product(large)
    for i in range(most):
        begun = time.perf_counter()
        small = framework.product(small)
        if time.perf_counter() - begun > whole / 5:
            framework.wait(small)
            return i, 1e3 * whole
    framework.wait(small)
    framework.wait(held)
    return None, 1e3 * whole


def facts(framework: Framework, n: int = 512, steps: int = 20) -> Facts:
    """The medians, in words of a table."""
    host = {name: median(values) for name, values in host_cost(framework).items()}
    ahead = run_ahead(framework, n, steps)
    return {
        f"µs until {OPERATIONS} operations return, as written": host["as written"],
        f"µs until {OPERATIONS} operations return, compiled": host["compiled"],
        **{f"ms of {steps} products: {name}": value for name, value in ahead.items()},
        "answers equal": bool(
            np.allclose(
                _host(framework.chain(framework.make(8))), np.asarray(chain(np.full((8, 8), 1 / 8)))
            )
        ),
    }


def _host(x: Any) -> np.ndarray:
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    sides = {"JAX": lambda: facts(jax_side()), "PyTorch": lambda: facts(torch_side())}
    return side_by_side(CLAIM, sides)


if __name__ == "__main__":
    main()
