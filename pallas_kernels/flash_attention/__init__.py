"""Attention with several implementations behind one function.

`attention(...)` picks an implementation, as `choose(...)` tells, and says which in the debug log;
`supported(...)` gives the reason why one refuses. `reference.py` is the specification.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import (
    chunked,
    cudnn,
    mosaic_gpu,
    mosaic_tpu,
    reference,
    triton,
)

__all__ = ["IMPLEMENTATIONS", "attention", "choose", "supported"]

IMPLEMENTATIONS = ("cudnn", "mosaic_gpu", "mosaic_tpu", "triton", "chunked", "reference")
DENSE_LIMIT = 2048  # queries; above it the reference's [T, S] matrix is never built by choice
_BACKENDS: dict[str, Any] = {
    "cudnn": cudnn, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu, "triton": triton,
    "chunked": chunked, "reference": reference,
}  # fmt: skip
_CHOSEN = ("mosaic_gpu", "cudnn", "mosaic_tpu", "triton")  # in this order, before plain XLA
_FEW_QUERIES = 64  # no more than these leave most of a fused kernel's blocks idle

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
    scale: float | None = None,
    q_offset: int | Array | None = None,
    sinks: object | None = None,
    deterministic: bool = False,
    platform: str | None = None,
) -> str | None:
    """Why `implementation` cannot take a call with these shapes, or None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
    if implementation in ("chunked", "reference"):
        return None
    return _BACKENDS[implementation].refusal(
        platform=platform or jax.default_backend(),
        dtype=dtype,
        T=q_shape[1],
        S=k_shape[1],
        H=q_shape[3],
        causal=causal,
        window=window,
        segments=segment_ids is not None,
        soft_cap=soft_cap,
        scale=scale,
        offset=q_offset is not None,
        sinks=sinks is not None,
        deterministic=deterministic,
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
    deterministic: bool = False,
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
      deterministic: gradients are the same bits in every run.
      implementation: one of IMPLEMENTATIONS, or None to choose. "triton" takes no `jax.vmap`.

    Raises:
      ValueError: shapes that do not fit, or an implementation that refuses.
    """
    _check(q, k, v, sinks)
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, segment_ids)
    masks: dict[str, Any] = {"causal": causal, "window": window, "segment_ids": segment_ids,
                             "soft_cap": soft_cap, "scale": scale, "sinks": sinks}  # fmt: skip
    asked = masks | {"q_offset": q_offset, "deterministic": deterministic}
    if implementation is None:
        implementation, why = choose(q.shape, k.shape, q.dtype, **asked)
        _log.debug("attention %s: %s (%s)", q.shape, implementation, why)
    elif reason := supported(implementation, q.shape, k.shape, q.dtype, **asked):
        raise ValueError(f"attention(implementation={implementation!r}): {reason}")
    if implementation == "cudnn":
        out, lse = cudnn.attention(q, k, v, causal=causal, window=window, scale=scale)
    else:
        offset = 0 if q_offset is None else q_offset
        if implementation == "mosaic_gpu":  # the others' gradients are the same bits in any case
            masks["deterministic"] = deterministic
        out, lse = _BACKENDS[implementation].attention(q, k, v, q_offset=offset, **masks)
    return (out, lse) if return_lse else out


def choose(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype, **options: Any
) -> tuple[str, str]:
    """What `attention` takes for such a call, the options being `supported`'s, and why."""
    T, reasons = q_shape[1], []
    plain = "chunked" if T > DENSE_LIMIT else "reference"
    if (options.get("platform") or jax.default_backend()) == "cpu":
        return plain, "fused kernels need a GPU or a TPU"
    for name in _CHOSEN if T > _FEW_QUERIES else ("cudnn",):
        reason = supported(name, q_shape, k_shape, dtype, **options)
        if reason is None and name != "cudnn" and jax.device_count() > 1:
            reason = "XLA does not partition it; ask for it inside shard_map"
        if reason is None:
            return name, "; ".join(reasons) or "fastest here"
        reasons.append(f"{name}: {reason}")
    return plain, "; ".join(reasons)


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
