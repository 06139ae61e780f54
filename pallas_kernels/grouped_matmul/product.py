"""`grouped_matmul`: which implementation multiplies, with its gradients."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _compat, shards
from pallas_kernels.grouped_matmul import configs, mosaic_gpu, mosaic_gpu_wgrad, xla
from pallas_kernels.grouped_matmul.ping_pong import Config

IMPLEMENTATIONS = ("mosaic_gpu", "xla")
_log = logging.getLogger(__name__)


def supported(implementation: str, dtype: Any, *, platform: str | None = None) -> str | None:
    """Why `implementation` cannot multiply groups of `dtype` here, or None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
    if implementation == "xla":
        return None
    platform = platform or jax.default_backend()
    if reason := _compat.not_hopper(platform):
        return reason
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"Mosaic GPU's kernel multiplies bfloat16 and float16, not {jnp.dtype(dtype).name}"
    return None


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    counts: Int[Array, " G"],
    *,
    implementation: str | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, summed in float32 and rounded once to x's dtype.

    Rows lie in the order of groups: the first counts[0] are group 0's, and so on. Rows behind the
    last group give zeros and no gradient, whatever they hold. Differentiable in x and w; w's
    gradient is x_g^T dy_g of each group, by a kernel of its own. Under `vmap` "xla" wants every
    array mapped.

    Args:
      x, w: one float dtype.
      counts: how many rows each group has, zero or more, at most M together.
      implementation: one of IMPLEMENTATIONS, or None to choose: "mosaic_gpu" on one Hopper GPU, or
        on several inside `shard_map`.
      config: the schedule of "mosaic_gpu", of its gradients too; None to choose.
      interpret: runs "mosaic_gpu" on a CPU; `pallas_kernels.interpreter.interpret` gives it.

    "mosaic_gpu" pads, at the cost of a copy, K and N that are not multiples of 64 and M that is
    not one of 8.

    Raises ValueError: shapes or dtypes that do not fit, or an implementation that refuses.
    """
    _check(x, w, counts)
    if interpret:
        implementation = "mosaic_gpu"
    elif implementation is None:
        reason = supported("mosaic_gpu", x.dtype)
        if reason is None and shards.partitioned():
            reason = "XLA does not partition it; ask for it inside shard_map"
        implementation = "xla" if reason else "mosaic_gpu"
        _log.debug("grouped_matmul %s %s: %s (%s)", x.shape, w.shape, implementation,
                   reason or "it measured faster than XLA")  # fmt: skip
    elif reason := supported(implementation, x.dtype):
        raise ValueError(f"grouped_matmul(implementation={implementation!r}): {reason}")
    call = _Call(implementation, config, interpret)
    return _grouped(call, *shards.alike(x, w, counts))


def _check(x: Array, w: Array, counts: Array) -> None:
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or counts.shape != w.shape[:1]:
        raise ValueError(
            f"grouped_matmul: x{x.shape}, w{w.shape}, counts{counts.shape}; "
            "want [M, K], [G, K, N] and [G]"
        )
    if 0 in (*x.shape, *w.shape):
        raise ValueError(f"grouped_matmul: x{x.shape} and w{w.shape} must not be empty")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"grouped_matmul: dtypes {x.dtype} and {w.dtype}; want one floating-point dtype"
        )
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: counts of {counts.dtype}; want integers")


@dataclasses.dataclass(frozen=True)
class _Call:
    implementation: str
    config: Config | None
    interpret: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(call: _Call, x, w, counts):
    return _product(call, x, w, counts, transpose_w=False)


def _forward(call: _Call, x, w, counts):
    return _product(call, x, w, counts, transpose_w=False), (x, w, counts)


def _backward(call: _Call, kept, dy):
    x, w, counts = kept
    return _product(call, dy, w, counts, transpose_w=True), _wgrad(call, x, dy, counts), None


_grouped.defvjp(_forward, _backward)


def _product(call: _Call, x, w, counts, *, transpose_w: bool) -> Array:
    if call.implementation == "xla":
        return xla.grouped_matmul(x, w, counts, transpose_w=transpose_w)
    M, N = x.shape[0], w.shape[1 if transpose_w else 2]
    x, w = _padded(x, 8, 64), _padded(w, 64, 64)
    config = call.config or configs.choose(M, N, w.shape[0])
    out = mosaic_gpu.grouped_matmul(
        x, w, counts, config=config, transpose_w=transpose_w, interpret=call.interpret
    )
    return shards.like(out, x)[:M, :N]


def _wgrad(call: _Call, x, dy, counts) -> Array:
    if call.implementation == "xla":
        return xla.wgrad(x, dy, counts)
    K, N = x.shape[1], dy.shape[1]
    config = call.config or configs.choose_wgrad(N)
    out = mosaic_gpu_wgrad.wgrad(
        _padded(x, 8, 64), _padded(dy, 8, 64), counts, config=config, interpret=call.interpret
    )
    return shards.like(out, x)[:, :K, :N]


def _padded(x: Array, *multiples: int) -> Array:
    """`x` with zeros after its last axes, which come to multiples of `multiples`."""
    beyond = [
        (0, -size % multiple)
        for size, multiple in zip(x.shape[-len(multiples) :], multiples, strict=True)
    ]
    beyond = [(0, 0)] * (x.ndim - len(beyond)) + beyond
    return jnp.pad(x, beyond) if any(after for _, after in beyond) else x
