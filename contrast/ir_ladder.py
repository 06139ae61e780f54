"""From Python to kernels: how many operations stand on each rung of the two compilers' ladders.

JAX: jaxpr, StableHLO, optimised HLO, where what one fusion holds is one kernel. PyTorch: Dynamo's
FX graph of the user's calls, AOTAutograd's graph of ATen operations, Inductor's kernels. Both
ladders first grow, as operations are taken apart, and then shrink, as they are fused. What they
fuse is what saves memory traffic: each kernel reads its inputs from memory and writes its outputs
to it.

    python -m contrast.ir_ladder
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from contrast import peer
from contrast.capture import Graphs
from contrast.inductor_source import launches
from contrast.show import Facts, side_by_side

CLAIM = (
    "Both compilers take operations apart, then fuse what stands between two products into a "
    "kernel or two."
)
T, D, F = 64, 32, 128
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = .*?\b([a-z][a-z0-9-]*)\(", re.MULTILINE)


def block(lib: Any, x: Any, w1: Any, w2: Any) -> Any:
    """x [T, D] -> [T, D]: two products, with a normalisation and a gate around them."""
    y = x * lib.rsqrt((x * x).mean(-1)[:, None] + 1e-6)
    h = y @ w1
    return x + (h * lib.sigmoid(h)) @ w2


def in_jax() -> Facts:
    """Counts of every rung of `jax.jit`."""
    x, w1, w2 = (jnp.ones(shape) for shape in ((T, D), (D, F), (F, D)))

    def function(x: Any, w1: Any, w2: Any) -> Any:
        lib = type("", (), {"rsqrt": jax.lax.rsqrt, "sigmoid": jax.nn.sigmoid})
        return block(lib, x, w1, w2)

    traced = jax.jit(function).trace(x, w1, w2)
    lowered = traced.lower()
    hlo = lowered.compile().as_text() or ""
    kernels = [op for op in instructions(entry(hlo)) if op not in _NO_KERNEL]
    return {
        "captured": _equations(traced.jaxpr.jaxpr),
        "taken apart": len(re.findall(r"= stablehlo\.(?!constant)", lowered.as_text())),
        "kernels": len(kernels),
        "of them products": len(re.findall(r" (?:dot|custom-call)\(", hlo)),
    }


def entry(hlo: str) -> str:
    """The text of the entry computation of an HLO module."""
    begun = hlo.index("\nENTRY ")
    return hlo[begun : hlo.index("\n}", begun)]


def instructions(computation: str) -> list[str]:
    """The operations of a computation's instructions, in order."""
    return _INSTRUCTION.findall(computation)


def _equations(jaxpr: Any) -> int:
    """Equations, those inside calls of jitted functions instead of the calls."""
    inner = [
        eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.primitive.name in ("jit", "pjit")
    ]
    return len(jaxpr.eqns) - len(inner) + sum(map(_equations, inner))


def in_torch() -> Facts:
    """Counts of every rung of `torch.compile`."""
    torch = peer.compile_afresh()
    args = [torch.ones(shape) for shape in ((T, D), (D, F), (F, D))]

    def function(x: Any, w1: Any, w2: Any) -> Any:
        return block(torch, x, w1, w2)

    captured, apart = Graphs(), Graphs()
    torch.compile(function, backend=captured)(*args)
    torch.compiler.reset()
    common = peer.load("torch._dynamo.backends.common")
    decompositions = peer.load("torch._inductor.decomposition").select_decomp_table()
    aten = common.aot_autograd(fw_compiler=apart, decompositions=decompositions)
    torch.compile(function, backend=aten)(*args)
    torch.compiler.reset()
    _, (code, *_) = peer.load("torch._inductor.utils").run_and_get_code(
        torch.compile(function), *args
    )
    launched = launches(code)
    return {
        "captured": captured.operations,
        "taken apart": apart.operations,
        "kernels": len(launched),
        "of them products": sum(not name.startswith("cpp_fused") for name in launched),
    }


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": in_torch})


if __name__ == "__main__":
    main()
