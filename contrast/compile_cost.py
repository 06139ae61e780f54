"""What L layers cost the compiler: unrolled, as one loop, and a block at a time.

A Python loop over layers is gone before either compiler sees it: the program holds every layer,
and compiling grows with L. `lax.scan` keeps one body and a trip count, so that the program does
not grow. PyTorch's answer is regional: compile the block, and call it L times from Python, whose
price is L dispatches a step and no fusion across blocks.

    python -m contrast.compile_cost
"""

from __future__ import annotations

import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from contrast import peer
from contrast.capture import Graphs
from contrast.show import Facts, side_by_side
from jaxinfra import measure

CLAIM = (
    "A loop that the compiler sees unrolled costs it time in proportion to its layers; scan and "
    "regional compiling cost one layer."
)
DEPTHS = (4, 16)
T, D = 16, 32


def layer(lib: Any, x: Any, w: Any) -> Any:
    """x [T, D], w [D, D] -> [T, D]."""
    return x + lib.tanh(x @ w)


def unrolled(x: Any, ws: Any) -> Any:
    """All layers of ws [L, D, D], one after the other in Python."""
    for i in range(ws.shape[0]):
        x = layer(jnp, x, ws[i])
    return x


def scanned(x: Any, ws: Any) -> Any:
    """The same layers as one loop."""
    return jax.lax.scan(lambda x, w: (layer(jnp, x, w), None), x, ws)[0]


def in_jax() -> Facts:
    """Instructions and seconds of the gradient's program, at each depth."""
    facts: dict[str, object] = {}
    for name, function in {"unrolled": unrolled, "one loop": scanned}.items():
        gradient = jax.grad(lambda ws, x, f=function: f(x, ws).sum())
        for depth in DEPTHS:
            shapes = (depth, D, D), (T, D)
            args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
            found = measure.stages(gradient, *args)
            text = found.compiled.as_text()
            facts[f"{name}, L = {depth}: operations"] = len(re.findall(r"^\s+\S.* = ", text, re.M))
            facts[f"{name}, L = {depth}: seconds"] = found.trace + found.lower + found.compile
    return facts


def in_torch(backend: str | None = None) -> Facts:
    """Operations handed to the backend, and seconds, at each depth: whole, and a block at a time.

    Seconds are those of Dynamo, AOTAutograd and, with backend="inductor", of Inductor too; by
    default what follows AOTAutograd is left out: a C++ compiler's seconds would be all one sees.
    """
    torch = peer.compile_afresh()
    facts: dict[str, object] = {}
    torch.compile(torch.sin, backend=backend or "aot_eager")(torch.ones(1))  # imports
    for name in ("unrolled", "a block at a time"):
        for depth in DEPTHS:
            torch.compiler.reset()
            graphs = Graphs()

            def compiled(function: Any, graphs: Any = graphs) -> Any:
                return torch.compile(function, backend=graphs)

            ws = torch.ones(depth, D, D, requires_grad=True)
            x = torch.ones(T, D)
            facts[f"{name}, L = {depth}: operations"] = _run(torch, name, compiled, ws, x, graphs)
            torch.compiler.reset()
            begun = time.perf_counter()
            _run(
                torch, name, lambda f: torch.compile(f, backend=backend or "aot_eager"), ws, x, None
            )
            facts[f"{name}, L = {depth}: seconds"] = time.perf_counter() - begun
    return facts


def _run(torch: Any, name: str, compiled: Any, ws: Any, x: Any, graphs: Any) -> int:
    """Runs a forward and a backward pass; the operations of all graphs that were handed over."""
    if name == "unrolled":

        def whole(x: Any, ws: Any) -> Any:
            for w in ws.unbind():
                x = layer(torch, x, w)
            return x

        out = compiled(whole)(x, ws)
    else:
        block = compiled(lambda x, w: layer(torch, x, w))
        out = x.clone().requires_grad_()  # as a layer's input is; else the first compiles apart
        for w in ws.unbind():
            out = block(out, w)
    out.sum().backward()
    return graphs.operations if graphs is not None else 0


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
