"""Derivatives: JAX linearises and transposes a program, PyTorch records a tape while it runs.

`jax.vjp` splits a function into a forward part and a linear one; the values that the linear part
needs, its residuals, are arrays that the returned function holds. Each primitive's rule is for one
direction, and transposition makes the other. PyTorch's operations are coarser, and each has a
backward of its own that says which tensors to save; calling it again with `create_graph` records a
tape of the tape. Outside one `jit`, JAX's residuals are many, because its primitives are small;
inside one, the compiler decides again what to keep.

    python -m contrast.autodiff
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from contrast import peer, tape
from contrast.show import Facts, side_by_side
from jaxinfra import measure

CLAIM = (
    "What is kept for the backward pass follows from the size of the operations: JAX's rules "
    "keep masks and derivatives, PyTorch's keep inputs and outputs."
)
N = 1024  # numbers of the argument, float32
ORDERS = (1, 2, 3, 4)


def functions(numpy: Any, nn: Any) -> dict[str, Callable[[Any], Any]]:
    """Functions of N numbers whose residuals say how a framework thinks."""
    return {
        "sin": numpy.sin,
        "tanh": numpy.tanh,
        "relu": nn.relu,
        "gelu": nn.gelu,
        "softmax": lambda x: nn.softmax(x, -1),
        "x * x + x": lambda x: x * x + x,
    }


def in_jax() -> Facts:
    """Bytes of residuals a number, and operations of higher derivatives."""
    x = jax.ShapeDtypeStruct((N,), jnp.float32)
    facts: dict[str, object] = {}
    for name, function in functions(jnp, jax.nn).items():
        facts[f"bytes kept a number: {name}"] = residual_bytes(function, x) / N
    inside = jax.jit(jax.value_and_grad(lambda x: jax.nn.gelu(x).sum())).lower(x).compile()
    facts["bytes kept a number: gelu, compiled"] = measure.memory(inside).temporary / N
    derivative: Callable = lambda x: jnp.sin(x) * jnp.exp(x)  # noqa: E731
    for order in ORDERS:
        derivative = jax.grad(derivative)
        facts[f"operations of derivative {order}"] = len(jax.make_jaxpr(derivative)(0.5).eqns)
    return facts


def residual_bytes(function: Callable, *args: Any) -> int:
    """Bytes that the backward function of `function` holds; nothing is computed."""
    backward = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def in_torch() -> Facts:
    """The same of the tape."""
    torch = peer.torch()
    x = torch.linspace(-2.0, 2.0, N, requires_grad=True)
    facts: dict[str, object] = {}
    for name, function in functions(torch, torch.nn.functional).items():
        facts[f"bytes kept a number: {name}"] = tape.saved_bytes(function, x) / N
    _, _, between = tape.partitioned(torch.nn.functional.gelu, x)
    facts["bytes kept a number: gelu, compiled"] = between / N
    point = torch.tensor(0.5, requires_grad=True)
    derivative = torch.sin(point) * torch.exp(point)
    for order in ORDERS:
        with tape.watched() as seen:
            (derivative,) = torch.autograd.grad(derivative, point, create_graph=True)
        facts[f"operations of derivative {order}"] = seen.kernels
    return facts


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
