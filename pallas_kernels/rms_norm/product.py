"""`rms_norm` and `add_rms_norm`: which implementation norms rows, with its gradients.

Bound by bytes, of an element each way and array: with the sum forward reads 2 arrays and writes 2,
backward reads 3 and writes 1. What XLA makes of it reads rows again for their statistics and for
the weight's gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.batching import unmapped
from pallas_kernels.rms_norm import mosaic_tpu, reference, triton

IMPLEMENTATIONS = ("mosaic_tpu", "triton", "xla")
_BACKENDS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu, "triton": triton}
_log = logging.getLogger(__name__)


def supported(
    implementation: str, D: int, dtype: Any, *, platform: str | None = None
) -> str | None:
    """Why `implementation` cannot norm rows of D numbers of `dtype` here, or None if it can."""
    return refusal(_BACKENDS, implementation, dtype, platform, D=D)


def refusal(
    backends: dict[str, Any], implementation: str, dtype: Any, platform: str | None, **sizes: int
) -> str | None:
    """Why `implementation`, "xla" or one of `backends`, cannot take such arrays, or None."""
    if implementation not in IMPLEMENTATIONS:
        return f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
    if implementation == "xla":
        return None
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize not in (2, 4):
        return f"the kernels take floats of 16 and 32 bits, not {jnp.dtype(dtype).name}"
    return backends[implementation].refusal(platform=platform or jax.default_backend(), **sizes)


def rms_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "*#rows D"],
    *,
    eps: float,
    plus_one: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*rows D"]:
    """x / sqrt(mean(x^2) + eps) times the weight, in float32, rounded once to x's dtype.

    Args:
      weight: [D]; of more axes by "xla" alone.
      plus_one: times one plus the weight (Gemma).
      implementation: one of IMPLEMENTATIONS, or None to choose, which is "xla" everywhere until
        a whole step is faster with another. The weight's gradient is summed in float32.

    Raises ValueError: shapes that do not fit, or an implementation that refuses.
    """
    call = _call(x, None, weight, eps, plus_one, implementation)
    if call.implementation == "xla":
        return reference.rms_norm(x, weight, eps=eps, plus_one=plus_one)
    out: Any = _norm(call, x, None, weight)
    return out[1]


def add_rms_norm(
    x: Float[Array, "*rows D"],
    residual: Float[Array, "*rows D"],
    weight: Float[Array, "*#rows D"],
    *,
    eps: float,
    plus_one: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """x + residual, rounded to their dtype, and `rms_norm` of that sum."""
    call = _call(x, residual, weight, eps, plus_one, implementation)
    if call.implementation == "xla":
        return reference.add_rms_norm(x, residual, weight, eps=eps, plus_one=plus_one)
    return _norm(call, x, residual, weight)


@dataclasses.dataclass(frozen=True)
class Call:
    """Which implementation, and what it and the reference are told."""

    implementation: str
    eps: float
    plus_one: bool

    @property
    def options(self) -> dict[str, Any]:
        return {"eps": self.eps, "plus_one": self.plus_one}


def _call(
    x: Array, residual: Array | None, weight: Array, eps: float, plus_one: bool, asked: str | None
) -> Call:
    given = f"rms_norm: x{x.shape}, weight{weight.shape}"
    if x.ndim < 1 or weight.shape[-1:] != x.shape[-1:] or weight.ndim > x.ndim:
        raise ValueError(f"{given}; want [..., D] and [D]")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{given} of {x.dtype}, residual{residual.shape} of {residual.dtype}; want both alike"
        )
    if asked is None:
        _log.debug("%s: xla; no other was timed within a step yet", given)
        return Call("xla", eps, plus_one)
    reason = supported(asked, x.shape[-1], x.dtype)
    if reason is None and asked != "xla" and (weight.ndim != 1 or 0 in x.shape):
        reason = "it takes a weight [D] and no empty array"
    if reason:
        raise ValueError(f"{given}, implementation={asked!r}: {reason}")
    return Call(asked, eps, plus_one)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(call: Call, x, residual, weight):
    return _run(call)(x, residual, weight)


def _forward(call: Call, x, residual, weight):
    total, out = _run(call)(x, residual, weight)
    return (total, out), (total, weight, residual is not None)


def _backward(call: Call, kept, cotangents):
    total, weight, added = kept
    dx, dweight = _run_back(call)(total, weight, *cotangents)
    return dx, dx if added else None, dweight


_norm.defvjp(_forward, _backward)


@functools.cache
def _run(call: Call) -> Any:
    """(sum, norm) of x, what is added to it or None, and the weight."""

    def kernel(x, residual, weight):
        rows = [None if a is None else a.reshape(-1, a.shape[-1]) for a in (x, residual)]
        out = _BACKENDS[call.implementation].forward(*rows, weight, **call.options)
        return tuple(a.reshape(x.shape) for a in out)

    def plain(x, residual, weight):
        if residual is None:
            return x, reference.rms_norm(x, weight, **call.options)
        return reference.add_rms_norm(x, residual, weight, **call.options)

    return unmapped(kernel, plain)


@functools.cache
def _run_back(call: Call) -> Any:
    """Gradients of the sum and the weight by what came back of sum and norm."""

    def kernel(total, weight, dtotal, dout):
        rows = (a.reshape(-1, a.shape[-1]) for a in (total, dtotal, dout))
        dx, dweight = _BACKENDS[call.implementation].backward(*rows, weight, **call.options)
        return dx.reshape(total.shape), dweight.astype(weight.dtype)

    def plain(total, weight, dtotal, dout):
        _, pull = jax.vjp(lambda x, w: reference.rms_norm(x, w, **call.options), total, weight)
        dx, dweight = pull(dout)
        return dx + dtotal, dweight

    return unmapped(kernel, plain)
