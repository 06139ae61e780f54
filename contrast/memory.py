"""Who owns memory: a plan of the whole program, or an allocator that answers request by request.

XLA knows every buffer and its life before anything runs, and lays them into one block: the peak is
known when compiling ends, and donated arguments become outputs. PyTorch asks a caching allocator
at every operation, frees when the last reference dies, and its peak is what the order of Python's
statements made it; `optimizer.step` in place needs no donation. The allocator rounds, keeps what
was freed, and can be left with holes that no request fits (`fragmentation`, on a GPU).

    python -m contrast.memory
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from contrast import peer, tape
from contrast.show import Facts, side_by_side
from jaxinfra import measure
from jaxinfra.errors import UserError

CLAIM = (
    "XLA knows a step's peak before it runs; in PyTorch the peak is what the order of "
    "statements made it, and both need the same few arrays."
)
T, D, F = 256, 64, 256
_WEIGHTS = (D, F), (F, F), (F, D)
RATE = 0.01


def forward(lib: Any, ws: Any, x: Any) -> Any:
    """x [T, D] -> [T, D] through three products."""
    return lib.tanh(lib.tanh(x @ ws[0]) @ ws[1]) @ ws[2]


def step(ws: Any, x: Any) -> Any:
    """One step of gradient descent on the mean square: the new weights."""
    gradients = jax.grad(lambda ws: (forward(jnp, ws, x) ** 2).mean())(ws)
    return jax.tree.map(lambda w, g: w - RATE * g, ws, gradients)


def in_jax() -> Facts:
    """KiB of the step as XLA plans it, with and without donated weights."""
    ws = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in _WEIGHTS)
    x = jax.ShapeDtypeStruct((T, D), jnp.float32)
    plans = {
        name: measure.memory(jax.jit(step, donate_argnums=donated).lower(ws, x).compile())
        for name, donated in {"kept": (), "given up": (0,)}.items()
    }
    found: dict[str, object] = {"KiB of weights": sum(a * b for a, b in _WEIGHTS) * 4 / 1024}
    for name, plan in plans.items():
        whole = plan.arguments + plan.outputs + plan.temporary - plan.aliased
        found[f"KiB at once, old weights {name}"] = whole / 1024
    found["KiB of outputs in donated memory"] = plans["given up"].aliased / 1024
    found["known before it runs"] = True
    return found


def in_torch() -> Facts:
    """KiB alive at the worst moment of the step, for two orders of the same statements."""
    torch = peer.torch()
    found: dict[str, object] = {"KiB of weights": sum(a * b for a, b in _WEIGHTS) * 4 / 1024}

    def weights() -> list[Any]:
        return [torch.full(shape, 0.01, requires_grad=True) for shape in _WEIGHTS]

    def functional(ws: list[Any], x: Any) -> Any:
        loss = (forward(torch, ws, x) ** 2).mean()
        return [w - RATE * g for w, g in zip(ws, torch.autograd.grad(loss, ws), strict=True)]

    def in_place(ws: list[Any], x: Any) -> None:
        for w in ws:  # each gradient is used and freed as soon as it is there
            w.register_post_accumulate_grad_hook(_apply)
        (forward(torch, ws, x) ** 2).mean().backward()

    def _apply(w: Any) -> None:
        with torch.no_grad():
            w -= RATE * w.grad
        w.grad = None

    for name, do in {"old weights kept": functional, "old weights given up": in_place}.items():
        ws, x = weights(), torch.ones(T, D)
        with tape.watched(*ws, x) as seen:
            kept = do(ws, x)
        del kept
        given = sum(t.nbytes for t in (*ws, x))
        found[f"KiB at once, {name}"] = (given + seen.peak) / 1024
    found["known before it runs"] = False
    return found


def fragmentation(mebibytes: int = 64, blocks: int = 64) -> Facts:
    """PyTorch's CUDA allocator after every second block of a row was freed, in MiB; needs a GPU.

    Blocks are smaller than the segments that the allocator asks the driver for, so that freed ones
    lie between used ones; then one request of half of all that is free comes.
    """
    torch = peer.torch()
    if not torch.cuda.is_available():
        raise UserError("fragmentation: PyTorch sees no CUDA device; run this on a GPU")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    each = (mebibytes << 20) // blocks
    held = [torch.empty(each, dtype=torch.uint8, device="cuda") for _ in range(blocks)]
    del held[::2]
    free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    before = torch.cuda.memory_reserved()
    large = torch.empty(free // 2, dtype=torch.uint8, device="cuda")
    after = torch.cuda.memory_reserved()
    found = {
        "MiB in use": (torch.cuda.memory_allocated() - start - large.nbytes) / 2**20,
        "MiB free in the cache": free / 2**20,
        "MiB asked for": large.nbytes / 2**20,
        "MiB taken from the driver for it": (after - before) / 2**20,
    }
    del held, large
    torch.cuda.empty_cache()
    return found


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
