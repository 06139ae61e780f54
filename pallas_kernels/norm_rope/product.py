"""`norm_rope`: which implementation norms and turns queries and keys, with its gradients.

Bound by bytes: forward reads and writes q and k once, backward reads them and what came back, and
writes the gradients; forward the tables of angles add 2 / (itemsize (N + K)) of that.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.batching import unmapped
from pallas_kernels.norm_rope import mosaic_tpu, reference, triton
from pallas_kernels.rms_norm.product import Call, refusal

_BACKENDS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu, "triton": triton}
_log = logging.getLogger(__name__)


def supported(
    implementation: str, N: int, K: int, H: int, dtype: Any, *, platform: str | None = None
) -> str | None:
    """Why `implementation` cannot take N and K heads of H numbers of `dtype`, or None if it can."""
    return refusal(_BACKENDS, implementation, dtype, platform, N=N, K=K, H=H)


def norm_rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    cos: Float[Array, "#B T 1 h"],
    sin: Float[Array, "#B T 1 h"],
    q_norm: Float[Array, " H"] | None = None,
    k_norm: Float[Array, " H"] | None = None,
    *,
    eps: float = 1e-6,
    plus_one: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """q and k, each head normed (RMSNorm, where there are weights) and its pairs turned.

    Pairs are (x[i], x[i + h]), h = H/2. All is computed in float32 and rounded once.

    Args:
      cos, sin: float32, of the angles of every position and pair; no kernel gives their gradients.
      q_norm, k_norm: both or neither.
      eps, plus_one: of the norms; see `rms_norm`.
      implementation: one of `rms_norm`'s, or None to choose, which is "xla" everywhere until
        a whole step is faster with another.

    Raises ValueError: shapes that do not fit, or an implementation that refuses.
    """
    given = _check(q, k, cos, sin, q_norm, k_norm)
    if implementation is None:
        implementation = "xla"
        _log.debug("%s: xla; no other was timed within a step yet", given)
    elif reason := supported(implementation, q.shape[2], k.shape[2], q.shape[3], q.dtype):
        raise ValueError(f"{given}, implementation={implementation!r}: {reason}")
    weights = None if q_norm is None else (q_norm, k_norm)
    if implementation == "xla":
        return reference.norm_rope(
            q, k, cos, sin, *(weights or (None, None)), eps=eps, plus_one=plus_one
        )
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"{given}, implementation={implementation!r}: it takes no empty array")
    angles = tuple(jnp.broadcast_to(a, (*q.shape[:2], 1, q.shape[3] // 2)) for a in (cos, sin))
    return _norm_rope(Call(implementation, eps, plus_one), (q, k), weights, angles)


def _check(q, k, cos, sin, q_norm, k_norm) -> str:
    """What was given, in words."""
    given = f"norm_rope: q{q.shape}, k{k.shape}, cos{cos.shape}, sin{sin.shape}"
    fits = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or q.shape[3] % 2 or q.dtype != k.dtype:
        raise ValueError(f"{given}; want [B,T,N,H] and [B,T,K,H] of one dtype and even H")
    angles = (q.shape[1], 1, q.shape[3] // 2)
    if any(a.ndim != 4 or a.shape[0] not in (1, q.shape[0]) or a.shape[1:] != angles
           for a in (cos, sin)):  # fmt: skip
        raise ValueError(f"{given}; want angles of {(q.shape[0], *angles)}")
    norms = [None if w is None else w.shape for w in (q_norm, k_norm)]
    if norms not in ([None, None], [(q.shape[3],)] * 2):
        raise ValueError(f"{given}, norms of {norms}; want ({q.shape[3]},) twice, or neither")
    return given


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_rope(call: Call, heads, weights, angles):
    return _run(call)(heads, weights, angles)


def _forward(call: Call, heads, weights, angles):
    kept = heads if weights is not None else None
    return _run(call)(heads, weights, angles), (kept, weights, angles)


def _backward(call: Call, kept, slopes):
    heads, weights, angles = kept
    if weights is None:  # a rotation's gradient is the rotation back
        cos, sin = angles
        return _run(call)(slopes, None, (cos, -sin)), None, None
    return *_run_back(call)(heads, weights, angles, slopes), None


_norm_rope.defvjp(_forward, _backward)


@functools.cache
def _run(call: Call) -> Any:
    """(q, k) after norms and rotation."""

    def kernel(heads, weights, angles):
        flat, angles = _flat(heads, angles)
        out = _BACKENDS[call.implementation].forward(*flat, *angles, weights, **call.options)
        return tuple(a.reshape(x.shape) for a, x in zip(out, heads, strict=True))

    return unmapped(kernel, functools.partial(_plain, call))


@functools.cache
def _run_back(call: Call) -> Any:
    """Gradients of (q, k) before norms and rotation, and of the norms' weights."""

    def kernel(heads, weights, angles, slopes):
        flat, angles = _flat((*heads, *slopes), angles)
        backward = _BACKENDS[call.implementation].backward
        dq, dk, *dweights = backward(*flat, *angles, weights, **call.options)
        dheads = tuple(a.reshape(x.shape) for a, x in zip((dq, dk), heads, strict=True))
        return dheads, tuple(a.astype(w.dtype) for a, w in zip(dweights, weights, strict=True))

    def plain(heads, weights, angles, slopes):
        return jax.vjp(lambda x, w: _plain(call, x, w, angles), heads, weights)[1](slopes)

    return unmapped(kernel, plain)


def _plain(call: Call, heads, weights, angles):
    return reference.norm_rope(*heads, *angles, *(weights or (None, None)), **call.options)


def _flat(heads, angles) -> tuple[list[Array], list[Array]]:
    """Heads [M, N, H] and angles [M, h] of M positions."""
    return (
        [x.reshape(-1, *x.shape[2:]) for x in heads],
        [a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in angles],
    )
