"""Why fuse: the bytes of a chain of operations, one kernel each, and of the chain as one kernel.

Every operation that is a kernel of its own reads its arguments from memory and writes its result
to it. x [T, D] in a chain of k elementwise operations moves about 2 k T D numbers; fused, 2 T D,
whatever k is. Nothing is computed less. On a chip that could do hundreds of FLOPs in the time of
one byte, the bytes are the time.

    python -m contrast.fusion
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from contrast import peer, tape
from contrast.inductor_source import launches
from contrast.ir_ladder import entry, instructions
from contrast.show import Facts, side_by_side

CLAIM = (
    "A chain that is bound by memory takes the time of its bytes, and fusing it takes away all "
    "that go between its operations."
)
T, D = 64, 256
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def gated_norm(lib: Any, x: Any, g: Any) -> Any:
    """silu(rms_norm(x) g) of x [T, D] and g [D]."""
    y = x * lib.rsqrt((x * x).mean(-1)[:, None] + 1e-6) * g
    return y * (1 / (1 + lib.exp(-y)))


def in_jax() -> Facts:
    """Bytes and kernels, operation by operation and as XLA fused them."""
    x, g = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((T, D), (D,)))
    lib = type("", (), {"rsqrt": jax.lax.rsqrt, "exp": jnp.exp})
    jitted = jax.jit(lambda x, g: gated_norm(lib, x, g))
    moved = [_bytes(eqn) for eqn in _flat(jitted.trace(x, g).jaxpr.jaxpr)]
    text = jitted.lower(x, g).compile().as_text() or ""
    fused = [line for line in entry(text).splitlines() if instructions("\n" + line)]
    names = [instructions("\n" + line)[0] for line in fused]
    least = 4 * (2 * T * D + D)
    return {
        "kernels, operation by operation": len(moved),
        "kernels, compiled": sum(name not in _NO_KERNEL for name in names),
        "times the least bytes, operation by operation": sum(moved) / least,
    }


def _flat(jaxpr: Any) -> list[Any]:
    """Equations, those of inner jitted functions among them; no mere reshapes and broadcasts."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            found += _flat(eqn.params["jaxpr"].jaxpr)
        elif eqn.primitive.name not in ("broadcast_in_dim", "reshape", "squeeze"):
            found.append(eqn)
    return found


def _bytes(eqn: Any) -> int:
    """Bytes that an equation reads and writes as a kernel of its own."""
    return sum(
        v.aval.size * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars) if v.aval.shape
    )


def in_torch() -> Facts:
    """The same of eager PyTorch, and of Inductor's program."""
    torch = peer.compile_afresh()
    x, g = torch.ones(T, D), torch.ones(D)
    least = 4 * (2 * T * D + D)
    with tape.watched(x, g) as seen:
        gated_norm(torch, x, g)
    utils = peer.load("torch._inductor.utils")
    _, (text, *_) = utils.run_and_get_code(
        torch.compile(lambda x, g: gated_norm(torch, x, g)), x, g
    )
    return {
        "kernels, operation by operation": seen.kernels,
        "kernels, compiled": len(launches(text)),
        "times the least bytes, operation by operation": seen.moved / least,
    }


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
