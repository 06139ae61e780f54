"""Batching: `vmap` rewrites a program, or carries a hidden dimension through every operation.

`jax.vmap` has a rule for each primitive and returns a program with one operation for one operation,
whatever the size of the batch; a `cond` whose predicate is batched becomes a `select`, and both
branches run. `torch.func.vmap` wraps tensors and applies its rules when operations run; where it
has none it runs a loop and warns. Gradients of single examples are the classic use: one backward
pass for each, or one program.

    python -m contrast.batching
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrast import peer, tape
from contrast.show import Facts, side_by_side

CLAIM = (
    "Gradients of each example cost about as many operations as that of one, in both; a branch "
    "on a batched value runs both ways in JAX and is refused in PyTorch."
)
B, D = 16, 8


def loss(lib: Any, w: Any, x: Any) -> Any:
    """Mean square of tanh(x w) for one example x [D], w [D, D]."""
    return (lib.tanh(x @ w) ** 2).mean()


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """w [D, D] and xs [B, D], normal."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(D, D)).astype(np.float32), rng.normal(size=(B, D)).astype(np.float32)


def in_jax() -> Facts:
    """Operations of one gradient, of B in a loop, and of B by vmap; and what becomes of a cond."""
    w, xs = map(jnp.asarray, inputs())
    one = jax.grad(lambda w, x: loss(jnp, w, x))
    batched = jax.vmap(one, in_axes=(None, 0))

    def looped(w: Any, xs: Any) -> Any:
        return jnp.stack([one(w, x) for x in xs])

    def branch(x: Any) -> Any:
        return jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)

    names = [e.primitive.name for e in jax.make_jaxpr(jax.vmap(branch))(xs).eqns]
    return {
        "operations of one gradient": len(jax.make_jaxpr(one)(w, xs[0]).eqns),
        f"operations of {B}, in a loop": len(jax.make_jaxpr(looped)(w, xs).eqns),
        f"operations of {B}, by vmap": len(jax.make_jaxpr(batched)(w, xs).eqns),
        "largest difference": float(jnp.abs(batched(w, xs) - looped(w, xs)).max()),
        "a branch on a batched value": "both run, select" if "select_n" in names else "one runs",
        "branches on a value of the whole": "one runs" if _whole_branches(xs) else "both run",
    }


def _whole_branches(xs: Any) -> bool:
    """Whether a cond whose predicate is not batched is still a cond under vmap."""

    def branch(flag: Any, x: Any) -> Any:
        return jax.lax.cond(flag, jnp.sin, jnp.cos, x)

    jaxpr = jax.make_jaxpr(jax.vmap(branch, in_axes=(None, 0)))(True, xs)
    return "cond" in [e.primitive.name for e in jaxpr.eqns]


def in_torch() -> Facts:
    """Kernels that ran for the same, views left out."""
    torch = peer.torch()
    w, xs = map(torch.tensor, inputs())
    one = torch.func.grad(lambda w, x: loss(torch, w, x))
    batched = torch.func.vmap(one, in_dims=(None, 0))
    facts: dict[str, object] = {}
    with tape.watched() as seen:
        one(w, xs[0])
    facts["operations of one gradient"] = seen.kernels
    with tape.watched() as seen:
        looped = torch.stack([one(w, x) for x in xs])
    facts[f"operations of {B}, in a loop"] = seen.kernels
    with tape.watched() as seen:
        together = batched(w, xs)
    facts[f"operations of {B}, by vmap"] = seen.kernels
    facts["largest difference"] = float((together - looped).abs().max())
    try:
        torch.func.vmap(lambda x: torch.sin(x) if x.sum() > 0 else torch.cos(x))(xs)
        facts["a branch on a batched value"] = "runs"
    except RuntimeError:
        facts["a branch on a batched value"] = "refused: RuntimeError"
    return facts


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
