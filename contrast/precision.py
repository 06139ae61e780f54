"""What a product of matrices is computed in: named per product, or set for the process or a block.

JAX's dtypes are in the program: `preferred_element_type` says what sums are kept in and
`precision` which algorithm of the hardware multiplies. Its default for float32 is the device's
fastest (TensorFloat-32 on NVIDIA GPUs, bfloat16 on TPUs). PyTorch's default is full float32 until
`set_float32_matmul_precision` says otherwise, and `autocast` chooses a dtype for each operation
from lists. Errors are in units of the last place (ULP) of float32, against float64.

    python -m contrast.precision
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrast import peer, tape
from contrast.show import Facts, side_by_side

CLAIM = (
    "The same product differs by thousands of times in its error with the algorithm that a "
    "default chooses; JAX names it in the program, PyTorch in the process."
)
M, K, N = 64, 512, 64
ALGORITHMS = ("F32_F32_F32", "TF32_TF32_F32", "BF16_BF16_F32", "BF16_BF16_F32_X3")


def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a [M, K], b [K, N] of normal float32 numbers, and a @ b in float64."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((M, K), (K, N)))
    return a, b, a.astype(np.float64) @ b.astype(np.float64)


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the error, in ULPs of float32 at the size of the exact values' own RMS.

    An ULP at each value's own size would weigh what cancelled, not what was computed.
    """
    scale = np.sqrt(np.mean(exact**2))
    return float(
        np.sqrt(np.mean((found.astype(np.float64) - exact) ** 2)) / np.spacing(np.float32(scale))
    )


def in_jax() -> Facts:
    """Errors by default, by the names that JAX has for algorithms, and by the dtype of the sum."""
    a, b, exact = matrices()
    facts: dict[str, object] = {}

    def note(name: str, product: Callable, *args: Any) -> None:
        try:
            facts[name] = error(np.asarray(jax.jit(product)(*args).astype(jnp.float32)), exact)
        except (NotImplementedError, jax.errors.JaxRuntimeError, ValueError):
            facts[name] = "not on this device"

    note("float32, by default: ULP", lambda a, b: a @ b, a, b)
    note("float32, highest: ULP", lambda a, b: jnp.matmul(a, b, precision="highest"), a, b)
    for name in ALGORITHMS:
        preset = jax.lax.DotAlgorithmPreset[name]
        note(f"algorithm {name}: ULP", lambda a, b, p=preset: jnp.matmul(a, b, precision=p), a, b)
    half = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
    note("bfloat16, result float32: ULP", _summed_in(jnp.float32), *half)
    note("bfloat16, result bfloat16: ULP", _summed_in(jnp.bfloat16), *half)
    traced = jax.jit(_mixed).trace(a, b)
    dots = [e for e in traced.jaxpr.eqns if e.primitive.name == "dot_general"]
    facts["dtypes, the program asked for bfloat16 products"] = (
        f"{dots[0].invars[0].aval.dtype} -> {dots[0].outvars[0].aval.dtype}, in the jaxpr"
    )
    return facts


def _summed_in(dtype: Any) -> Callable:
    return lambda a, b: jax.lax.dot(a, b, preferred_element_type=dtype)


def _mixed(a: Any, b: Any) -> Any:
    """A bfloat16 product with a float32 sum, and a softmax in float32: all of it written out."""
    h = jax.lax.dot(
        a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    return jax.nn.softmax(h, -1)


def in_torch(device: str = "cpu") -> Facts:
    """Errors by default and under each setting; what autocast ran in which dtype."""
    torch = peer.torch()
    a, b, exact = matrices()
    x, y = torch.tensor(a, device=device), torch.tensor(b, device=device)
    facts: dict[str, object] = {"float32, by default: ULP": error((x @ y).cpu().numpy(), exact)}
    before = torch.get_float32_matmul_precision()
    for setting in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(setting)
        facts[f"float32, {setting}: ULP"] = error((x @ y).cpu().numpy(), exact)
    torch.set_float32_matmul_precision(before)
    half = (x.bfloat16() @ y.bfloat16()).float()
    facts["bfloat16, result bfloat16: ULP"] = error(half.cpu().numpy(), exact)
    with tape.watched(x, y) as seen, torch.autocast(device, dtype=torch.bfloat16):
        torch.softmax(x @ y, -1)
    dtypes = dict(seen.outputs)
    facts["dtypes, the program asked for bfloat16 products"] = (
        f"mm {dtypes['mm']}, softmax {dtypes['_softmax']}, from autocast's lists"
    )
    return facts


def main() -> dict[str, Facts]:
    """Prints both; returns them."""
    peer_device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return side_by_side(CLAIM, {"JAX": in_jax, "PyTorch": lambda: in_torch(peer_device)})


if __name__ == "__main__":
    main()
