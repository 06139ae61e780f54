"""Memory against computing again: what L layers keep for their backward pass, and what it costs.

`jax.checkpoint` takes a policy, a predicate over primitives, and rewrites the program; PyTorch's
`checkpoint` runs the forward again inside the backward, all of it or, selectively, what a policy
over ATen operations does not save. Its compiler cuts the joint graph by a minimum cut instead, and
asks nobody. The price is in FLOPs, and the same rule stands behind all: products are dear to
compute again and what stands between them is not. Two things stand in the way of a policy under
`jit`: the compiler drops what nobody keeps anyway, and in an unrolled program it may find the
second computation equal to the first and merge them again. XLA's CPU compiler does; in a loop it
cannot.

    python -m contrast.remat
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from contrast import peer, tape
from contrast.autodiff import residual_bytes
from contrast.show import Facts, side_by_side
from jaxinfra import measure

CLAIM = (
    "Keeping only a layer's input costs a sixth more FLOPs here, keeping the products none, in "
    "both; PyTorch's compiler also chooses by itself, and a policy under jit holds only inside "
    "a loop."
)
L, T, D, F = 4, 64, 32, 128
NUMBER = 4  # bytes
POLICIES = ("everything", "products", "inputs")


def layer(lib: Any, x: Any, w1: Any, w2: Any) -> Any:
    """x [T, D], w1 [D, F], w2 [F, D] -> [T, D]."""
    return x + lib.tanh(lib.exp(-((x @ w1) ** 2))) @ w2


def in_jax() -> Facts:
    """Bytes kept a position and layer, and FLOPs of forward and backward, by policy."""
    policies = {
        "everything": None,
        "products": jax.checkpoint_policies.dots_saveable,
        "inputs": jax.checkpoint_policies.nothing_saveable,
    }
    shapes = (T, D), (L, D, F), (L, F, D)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    facts: dict[str, object] = {}
    for name, policy in policies.items():
        block: Callable = functools.partial(layer, jnp)
        if policy is not None:
            block = jax.checkpoint(block, policy=policy)

        def whole(x: Any, w1: Any, w2: Any, block: Callable = block) -> Any:
            for i in range(L):
                x = block(x, w1[i], w2[i])
            return x

        def looped(x: Any, w1: Any, w2: Any, block: Callable = block) -> Any:
            return jax.lax.scan(lambda x, w: (block(x, *w), None), x, (w1, w2))[0]

        weights = sum(a.size * NUMBER for a in args[1:])
        kept = residual_bytes(whole, *args) - weights
        facts[f"numbers kept a position and layer: {name}"] = kept / NUMBER / T / L
        facts[f"FLOPs of products, to those of a forward: {name}"] = products(whole, *args)
        facts[f"temporary KiB, one loop compiled: {name}"] = temporary(looped, *args) / 1024
        if name != "products":
            facts[f"temporary KiB, unrolled and compiled: {name}"] = temporary(whole, *args) / 1024
    return facts


def temporary(whole: Callable, *args: Any) -> int:
    """Bytes of temporary memory of the compiled gradient."""
    return measure.memory(jax.jit(_gradient(whole)).lower(*args).compile()).temporary


def products(whole: Callable, *args: Any) -> float:
    """FLOPs of the products in the gradient's jaxpr over those of one forward pass."""
    return _dots(jax.make_jaxpr(_gradient(whole))(*args).jaxpr) / (L * 2 * 2 * T * D * F)


def _gradient(whole: Callable) -> Callable:
    return jax.grad(lambda *args: whole(*args).sum(), argnums=(0, 1, 2))


def _dots(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            deep = [eqn.invars[0].aval.shape[i] for i in contracted]
            total += 2 * functools.reduce(int.__mul__, deep, eqn.outvars[0].aval.size)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                total += _dots(getattr(inner, "jaxpr", inner))
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def in_torch() -> Facts:
    """The same, from storages that live between the passes, and the FLOPs that ATen ran."""
    torch = peer.torch()
    checkpoint = peer.load("torch.utils.checkpoint")
    counter = peer.load("torch.utils.flop_counter").FlopCounterMode
    saved = [torch.ops.aten.mm.default]
    options: dict[str, dict] = {
        "everything": {},
        "products": {
            "context_fn": functools.partial(checkpoint.create_selective_checkpoint_contexts, saved)
        },
        "inputs": {},
    }
    facts: dict[str, object] = {}
    block = functools.partial(layer, torch)
    for name in POLICIES:
        args = _arguments(torch)

        def whole(x: Any, w1: Any, w2: Any, name: str = name) -> Any:
            for i in range(L):
                inputs = (x, w1[i], w2[i])
                if name == "everything":
                    x = block(*inputs)
                else:
                    x = checkpoint.checkpoint(block, *inputs, use_reentrant=False, **options[name])
            return x

        with tape.watched(*args) as seen:
            out = whole(*args)
        kept = seen.live - out.nbytes
        with counter(display=False) as flops:
            whole(*args).sum().backward()
        facts[f"numbers kept a position and layer: {name}"] = kept / NUMBER / T / L
        facts[f"FLOPs of products, to those of a forward: {name}"] = flops.get_total_flops() / (
            L * 2 * 2 * T * D * F
        )
    _, _, between = tape.partitioned(_plain(block), *_arguments(torch))
    between -= sum(a.nbytes for a in _arguments(torch)[1:])
    facts["numbers kept a position and layer: compiler's choice"] = between / NUMBER / T / L
    return facts


def _plain(block: Callable) -> Callable:
    def whole(x: Any, w1: Any, w2: Any) -> Any:
        for i in range(L):
            x = block(x, w1[i], w2[i])
        return x

    return whole


def _arguments(torch: Any) -> list[Any]:
    shapes = (T, D), (L, D, F), (L, F, D)
    return [torch.full(shape, 0.01, requires_grad=True) for shape in shapes]


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
