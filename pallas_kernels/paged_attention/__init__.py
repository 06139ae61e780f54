"""Attention of a ragged batch over pages of keys and values, with several implementations.

`paged_attention(...)` picks an implementation, as `choose(...)` tells, and says which in the debug
log: "triton" on an NVIDIA GPU that takes the call, plain XLA elsewhere. `supported(...)` gives the
reason why one refuses; `append(...)` writes new tokens into pages. `reference.py` is the
specification. On one H200 Triton was the fastest of three for decode
steps and for chunks of prompts; "mosaic_tpu" has never run on a chip.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.paged_attention import mosaic_gpu, mosaic_tpu, reference, triton, xla
from pallas_kernels.paged_attention.pages import LARGEST, append, quantize

__all__ = ["IMPLEMENTATIONS", "append", "choose", "paged_attention", "quantize", "supported"]

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "triton", "xla", "reference")
_BACKENDS: dict[str, Any] = {
    "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu, "triton": triton, "xla": xla,
    "reference": reference,
}  # fmt: skip
_CHOSEN = ("triton",)  # in this order, before plain XLA

_log = logging.getLogger(__name__)


def supported(
    implementation: str,
    q_shape: tuple[int, ...],
    pages_shape: tuple[int, ...],
    dtype,
    pages_dtype,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    invariant: bool = False,
    platform: str | None = None,
) -> str | None:
    """Why `implementation` cannot take q [T,N,H] and pages [P,K,page,H], or None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
    if implementation == "reference":
        return "the reference is not batch-invariant; take 'xla'" if invariant else None
    if implementation == "xla":
        return None
    return _BACKENDS[implementation].refusal(
        platform=platform or jax.default_backend(),
        dtype=dtype,
        pages_dtype=pages_dtype,
        page=pages_shape[2],
        N=q_shape[1],
        K=pages_shape[1],
        H=q_shape[2],
        scale=scale,
        soft_cap=soft_cap,
    )


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P K page H"],
    v_pages: Num[Array, "P K page H"],
    page_table: Int[Array, "B M"],
    starts: Int[Array, " B+1"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "P K page"] | None = None,
    v_scale: Float[Array, "P K page"] | None = None,
    invariant: bool = False,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """softmax(scale q k^T) v over each row's own keys, up to each query's own position.

    Row b's queries are q[starts[b]:starts[b+1]], the last of them at position lengths[b] - 1; a row
    may have none. Position p of the row is place p % page of page page_table[b, p // page]. Tokens
    from starts[B] on give zeros; entries of the table past a row's pages may be any number.

    Args:
      q: float; N query heads share K key heads, N a multiple of K.
      k_pages, v_pages: float, or int8 or float8_e4m3fn with k_scale and v_scale, float32, one a
        token and head.
      window: a query sees only the last `window` keys, its own included.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap).
      sinks: one more logit a head that takes weight and has no value (arXiv 2309.17453; gpt-oss).
      invariant: a row's bits depend neither on other rows, nor on B, M or how its prompt was
        chunked; "xla" then takes its slower form.
      implementation: one of IMPLEMENTATIONS, or None to choose.

    Raises:
      ValueError: shapes that do not fit, or an implementation that refuses.
    """
    _check(q, k_pages, v_pages, page_table, starts, lengths, sinks, k_scale, v_scale)
    if window is not None and window < 1:
        raise ValueError(f"paged_attention: window={window}; want one key at least, or None")
    asked = {"scale": scale, "soft_cap": soft_cap, "invariant": invariant}
    facts = (q.shape, k_pages.shape, q.dtype, k_pages.dtype)
    if window is not None and window >= page_table.shape[1] * k_pages.shape[2]:
        window = None  # it leaves out no key that the table has room for
    if implementation is None:
        implementation, why = choose(*facts, **asked)
        _log.debug("paged_attention %s %s: %s (%s)", q.shape, k_pages.shape, implementation, why)
    elif reason := supported(implementation, *facts, **asked):
        raise ValueError(f"paged_attention(implementation={implementation!r}): {reason}")
    options: dict[str, Any] = {
        "scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks,
        "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    if implementation != "reference":
        options["invariant"] = invariant
    run = _BACKENDS[implementation].paged_attention
    return run(q, k_pages, v_pages, page_table, starts, lengths, **options)


def choose(
    q_shape: tuple[int, ...], pages_shape: tuple[int, ...], dtype, pages_dtype, **options: Any
) -> tuple[str, str]:
    """What `paged_attention` takes for such a call, the options being `supported`'s, and why."""
    reasons = []
    for name in _CHOSEN:
        reason = supported(name, q_shape, pages_shape, dtype, pages_dtype, **options)
        if reason is None and jax.device_count() > 1:
            reason = "XLA does not partition it; ask for it inside shard_map"
        if reason is None:
            return name, "it takes the call, and was the fastest on an H200"
        reasons.append(f"{name}: {reason}")
    return "xla", "; ".join(reasons)


def _check(q, k_pages, v_pages, page_table, starts, lengths, sinks, k_scale, v_scale) -> None:
    if q.ndim != 3 or k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(
            f"paged_attention: q{q.shape}, k_pages{k_pages.shape}, v_pages{v_pages.shape}; "
            "want [T,N,H], [P,K,page,H] twice"
        )
    if q.shape[2] != k_pages.shape[3] or q.shape[1] % k_pages.shape[1]:
        raise ValueError(
            f"paged_attention: q{q.shape} and k_pages{k_pages.shape} must share H, and N be a "
            "multiple of K"
        )
    B = lengths.shape[0]
    if page_table.ndim != 2 or page_table.shape[0] != B or starts.shape != (B + 1,) or not B:
        raise ValueError(
            f"paged_attention: page_table{page_table.shape}, starts{starts.shape}, "
            f"lengths{lengths.shape}; want [B,M], [B+1], [B] with a row at least"
        )
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(
            f"paged_attention: sinks{sinks.shape}; want one a query head, ({q.shape[1]},)"
        )
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"paged_attention: pages of {k_pages.dtype} and {v_pages.dtype}; want one dtype"
        )
    wanted = k_pages.shape[:3] if k_pages.dtype.name in LARGEST else None
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (None if scales is None else scales.shape) != wanted:
            raise ValueError(
                f"paged_attention: {name} {None if scales is None else scales.shape} for pages of "
                f"{k_pages.dtype.name}; want {wanted}"
            )
