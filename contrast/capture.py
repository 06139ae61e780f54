"""How a Python function becomes a graph: JAX runs it on abstract arrays, Dynamo reads its bytecode.

`jax.jit` calls the function once with tracers, which have a shape and a dtype and no values, and
keeps the operations they took part in. Everything else that Python did happened then, once, and is
gone. Dynamo interprets the function's bytecode, keeps the tensor operations in FX graphs, guards
whatever Python value it looked at, and where it cannot follow it breaks the graph and lets Python
go on.

    python -m contrast.capture
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from contrast import peer
from contrast.show import Facts, side_by_side

CLAIM = (
    "JAX captures a whole program or refuses; Dynamo captures what it can, and guards or "
    "re-runs the rest."
)
CALLS = 3


def plain(lib: Any, x: Any, w: Any) -> Any:
    """What both capture whole."""
    return lib.tanh(x @ w) + lib.sin(x) * 2.0


class Impure:
    """Functions that do more than compute; what they did to Python can be counted."""

    def __init__(self, lib: Any) -> None:
        self.lib, self.kept, self.scale = lib, [], 2.0

    def keeps(self, x: Any) -> Any:
        """Appends to a list between two operations."""
        y = self.lib.sin(x)
        self.kept.append("called")
        return self.lib.cos(y)

    def prints(self, x: Any) -> Any:
        """Prints between two operations."""
        y = self.lib.sin(x)
        print("called")
        return self.lib.cos(y)

    def scales(self, x: Any) -> Any:
        """Reads a number that may change between calls."""
        return self.lib.sin(x) * self.scale

    def branches(self, x: Any) -> Any:
        """Lets Python choose by a value of the array."""
        if x.sum() > 0:
            return self.lib.sin(x)
        return self.lib.cos(x)


def printed(function: Callable, x: Any) -> int:
    """Lines that CALLS calls print."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for _ in range(CALLS):
            function(x)
    return out.getvalue().count("called")


def in_jax() -> Facts:
    """What `jax.jit` makes of each."""
    x, w = jnp.ones((4, 4)), jnp.ones((4, 4))
    traced = jax.jit(lambda x, w: plain(jnp, x, w)).trace(x, w)
    impure = Impure(jnp)
    keeps, scales = jax.jit(impure.keeps), jax.jit(impure.scales)
    prints = jax.jit(impure.prints)
    lines = printed(prints, x)
    for _ in range(CALLS):
        keeps(x)
    first = scales(x)
    impure.scale = 3.0
    stale = bool((scales(x) == first).all())
    try:
        jax.jit(impure.branches)(x)
        refused = "no"
    except jax.errors.TracerBoolConversionError:
        refused = "refused: TracerBoolConversionError"
    return {
        "operations of a plain function": len(traced.jaxpr.eqns),
        f"a list it appends to, after {CALLS} calls": len(impure.kept),
        f"lines it prints in {CALLS} calls": lines,
        "graphs around the print": prints._cache_size(),  # type: ignore[attr-defined]
        "graphs around the list": keeps._cache_size(),  # type: ignore[attr-defined]
        "a branch on a value": refused,
        "a number changed between two calls": "old one used" if stale else "new one used",
        "programs then": scales._cache_size(),  # type: ignore[attr-defined]
        "guards on the plain function": "none; key: shape, dtype, sharding of each argument",
    }


class Graphs:
    """A backend for `torch.compile`: keeps the FX graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def __call__(self, graph: Any, _examples: Any) -> Callable:
        self.kept.append(graph)
        return graph.forward

    @property
    def operations(self) -> int:
        """Nodes that compute."""
        nodes = [node for graph in self.kept for node in graph.graph.nodes]
        return sum(node.op.startswith("call") for node in nodes)


def in_torch() -> Facts:
    """What `torch.compile` makes of each, with graphs run as they are."""
    torch = peer.compile_afresh()
    x, w = torch.ones(4, 4), torch.ones(4, 4)
    kept = {name: Graphs() for name in ("plain", "keeps", "prints", "scales", "branches")}
    impure = Impure(torch)

    def graphed(name: str, function: Callable) -> Callable:
        return torch.compile(function, backend=kept[name])

    graphed("plain", lambda x, w: plain(torch, x, w))(x, w)
    keeps = graphed("keeps", impure.keeps)
    for _ in range(CALLS):
        keeps(x)
    scales = graphed("scales", impure.scales)
    first = scales(x)
    impure.scale = 3.0
    stale = bool((scales(x) == first).all())
    graphed("branches", impure.branches)(x)
    told = torch._dynamo.explain(lambda x, w: plain(torch, x, w))(x, w)
    return {
        "operations of a plain function": kept["plain"].operations,
        f"a list it appends to, after {CALLS} calls": len(impure.kept),
        f"lines it prints in {CALLS} calls": printed(graphed("prints", impure.prints), x),
        "graphs around the print": len(kept["prints"].kept),
        "graphs around the list": len(kept["keeps"].kept),
        "a branch on a value": f"{len(kept['branches'].kept)} graphs, Python between",
        "a number changed between two calls": "old one used" if stale else "new one used",
        "programs then": len(kept["scales"].kept),
        "guards on the plain function": len(told.out_guards),
    }


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
