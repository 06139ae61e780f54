"""Changing an array: donation of a functional update, and mutation that is made functional again.

JAX has no mutation: `cache.at[i].set(v)` is a new array, and a copy unless the compiler may reuse
the old one's memory, which needs the old one to be donated (or to be a value inside the program,
as a loop's carry is). PyTorch mutates; each tensor counts its versions, so that a backward pass
that would read changed data fails. Its compiler first rewrites mutation into functional updates,
and Inductor then turns them back where nobody sees the difference.

    python -m contrast.in_place
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from contrast import peer
from contrast.ir_ladder import instructions
from contrast.show import Facts, side_by_side
from jaxinfra import measure

CLAIM = (
    "A functional update costs a copy until the buffer is donated; a mutation costs none, until "
    "something that needs the old value is found out at run time."
)
S, D, STEPS = 1024, 16, 8  # a cache [S, D] in float32: 64 KiB


def write(cache: Any, value: Any, at: Any) -> Any:
    """cache [S, D] with value [D] in row `at`."""
    return cache.at[at].set(value)


def fill(cache: Any, values: Any) -> Any:
    """cache with values [STEPS, D] in its first rows, written by a loop."""

    def body(cache: Any, i: Any) -> tuple[Any, None]:
        return write(cache, values[i], i), None

    return jax.lax.scan(body, cache, jnp.arange(STEPS, dtype=jnp.int32))[0]


def in_jax() -> Facts:
    """Copies and aliased bytes of one update, of one with donation, and of a loop."""
    cache = jax.ShapeDtypeStruct((S, D), jnp.float32)
    value, values = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((D,), (STEPS, D)))
    at = jax.ShapeDtypeStruct((), jnp.int32)
    kept = jax.jit(write).lower(cache, value, at).compile()
    donated = jax.jit(write, donate_argnums=0).lower(cache, value, at).compile()
    loop = jax.jit(fill, donate_argnums=0).lower(cache, values).compile()

    array = jnp.zeros((S, D))
    before = array.unsafe_buffer_pointer()
    after = donated(array, jnp.ones(D), jnp.int32(3))
    try:
        array.sum()
        error = "none"
    except (RuntimeError, ValueError) as raised:
        error = type(raised).__name__ + ": " + str(raised).split(".")[0][:48]
    return {
        "copies of the cache in one update": copies(kept),
        "copies, memory given up": copies(donated),
        "copies in a loop of 8 updates": copies(loop),
        "bytes that output shares with input": measure.memory(donated).aliased,
        "the same address after the update": after.unsafe_buffer_pointer() == before,
        "using the old value afterwards": error,
    }


def copies(compiled: Any) -> int:
    """Copies of a whole [S, D] in the program's text."""
    whole = [line for line in compiled.as_text().splitlines() if f"= f32[{S},{D}]" in line]
    return sum(op in ("copy", "copy-start") for op in instructions("\n".join(whole)))


def in_torch() -> Facts:
    """The same of index assignment, eager and compiled, and what the tape says of it."""
    torch = peer.compile_afresh()
    cache, value = torch.zeros(S, D), torch.ones(D)
    before = cache.data_ptr()
    cache[3] = value

    def update(cache: Any, value: Any) -> Any:
        cache[3] = value
        return cache

    def loop(cache: Any, values: Any) -> Any:
        for i in range(STEPS):
            cache[i] = values[i]
        return cache

    functional = _functional(torch, update, cache, value)
    x = torch.ones(D, requires_grad=True)
    y = x.exp()  # keeps its result
    y[0] = 0.0
    try:
        y.sum().backward()
        error = "none"
    except RuntimeError as raised:
        error = "RuntimeError: " + re.findall(r"modified by an inplace operation", str(raised))[0]
    return {
        "copies of the cache in one update": 0,
        "copies, memory given up": _allocations(torch, update, cache, value),
        "copies in a loop of 8 updates": _allocations(torch, loop, cache, torch.ones(STEPS, D)),
        "the same address after the update": cache.data_ptr() == before,
        "versions that the tensor counts": cache._version,
        "mutations in the functional graph": functional,
        "using the old value afterwards": error,
    }


def _allocations(torch: Any, function: Any, *args: Any) -> int:
    """Buffers of the cache's size that Inductor's program allocates."""
    torch.compiler.reset()
    utils = peer.load("torch._inductor.utils")
    _, (code, *_) = utils.run_and_get_code(torch.compile(function), *args)
    return len(re.findall(rf"= empty_strided_\w+\(\({S}, {D}\)", code))


def _functional(torch: Any, function: Any, *args: Any) -> str:
    """What functionalization makes of a mutation: the operations that replace it."""
    torch.compiler.reset()
    fx = peer.load("torch.fx.experimental.proxy_tensor")
    functional = torch.func.functionalize(function)
    graph = fx.make_fx(functional)(*(a.clone() for a in args)).graph
    names = [n.target.__name__.split(".")[0] for n in graph.nodes if n.op == "call_function"]
    return ", ".join(names)


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
