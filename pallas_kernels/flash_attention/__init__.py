"""Attention with several implementations behind one function.

`attention(...)` picks an implementation and says which in the debug log; `supported(...)` gives the
reason why one refuses. `reference.py` is the specification.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import chunked, cudnn, reference

__all__ = ["IMPLEMENTATIONS", "attention", "supported"]

IMPLEMENTATIONS = ("cudnn", "chunked", "reference")
DENSE_LIMIT = 2048  # queries; above it the reference's [T, S] matrix is never built by choice

_log = logging.getLogger(__name__)


def supported(
    implementation: str,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    dtype,
    *,
    causal: bool = False,
    window: int | Array | None = None,
    segment_ids: object | None = None,
    soft_cap: float | None = None,
    q_offset: int | Array | None = None,
    sinks: object | None = None,
    platform: str | None = None,
) -> str | None:
    """Why `implementation` cannot take a call with these shapes, or None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
    if implementation != "cudnn":
        return None
    return cudnn.refusal(
        platform=platform or jax.default_backend(),
        dtype=dtype,
        T=q_shape[1],
        S=k_shape[1],
        H=q_shape[3],
        causal=causal,
        window=window,
        segments=segment_ids is not None,
        soft_cap=soft_cap,
        offset=q_offset is not None,
        sinks=sinks is not None,
    )


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: int | Int[Array, " B"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """softmax(scale q k^T) v [B, T, N, H]; N query heads share K key heads, N a multiple of K.

    Args:
      q, k, v: same float dtype; T queries, S keys.
      causal: query t sees keys up to t + q_offset.
      window: sees only the last `window` keys, its own included; may be a traced scalar.
      segment_ids: one array where T = S, or (of the queries, of the keys); segments see themselves.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap).
      scale: on the logits; 1/sqrt(H) if None.
      q_offset: position of query 0 among the keys, one for all rows or one a row.
      sinks: one more logit a head that takes weight and has no value (arXiv 2309.17453; gpt-oss).
      return_lse: return (output, float32 log-sum-exp [B, N, T]).
      implementation: one of IMPLEMENTATIONS, or None to choose.

    Raises:
      ValueError: shapes that do not fit, or an implementation that refuses.
    """
    _check(q, k, v, sinks)
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    asked = {"causal": causal, "window": window, "segment_ids": segment_ids,
             "soft_cap": soft_cap, "q_offset": q_offset, "sinks": sinks}  # fmt: skip
    reason = supported(implementation or "cudnn", q.shape, k.shape, q.dtype, **asked)
    if implementation is None:
        implementation = (
            "cudnn" if reason is None else "chunked" if q.shape[1] > DENSE_LIMIT else "reference"
        )
        _log.debug("attention %s: %s (%s)", q.shape, implementation, reason or "fastest here")
    elif reason is not None:
        raise ValueError(f"attention(implementation={implementation!r}): {reason}")
    if implementation == "cudnn":
        assert window is None or isinstance(window, int)
        out, lse = cudnn.attention(q, k, v, causal=causal, window=window, scale=scale)
    else:
        run = chunked.attention if implementation == "chunked" else reference.attention
        out, lse = run(
            q, k, v, causal=causal, window=window, segment_ids=segment_ids, soft_cap=soft_cap,
            scale=scale, q_offset=0 if q_offset is None else jnp.asarray(q_offset), sinks=sinks,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(q: Array, k: Array, v: Array, sinks: Array | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention: q{q.shape}, k{k.shape}, v{v.shape}; want [B,T,N,H], [B,S,K,H] twice"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q{q.shape} and k{k.shape} must share B and H, and N be a multiple of K"
        )
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"attention: sinks{sinks.shape}; want one a query head, ({q.shape[2]},)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype} differ")
