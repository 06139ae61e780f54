"""Attention by NVIDIA's cuDNN through XLA: fused forward and backward, no [T, S] matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: Any = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The reference's result by `jax.nn.dot_product_attention(implementation="cudnn")`."""
    out, lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
        return_residual=True,
    )
    return out, jnp.swapaxes(lse, 1, 2)


def refusal(
    *,
    platform: str,
    dtype,
    T: int,
    S: int,
    H: int,
    causal: bool,
    window,
    segments: bool,
    soft_cap: float | None,
    offset: bool,
    sinks: bool,
    deterministic: bool,
    **_others,
) -> str | None:
    """Why cuDNN cannot take this call, or None if it can."""
    if platform not in ("gpu", "cuda"):
        return f"cuDNN needs an NVIDIA GPU, and arrays are on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if H % 8 or H > 128:
        return f"cuDNN takes a head width that is a multiple of 8 up to 128, not {H}"
    if segments:
        return "cuDNN's path takes no segment ids"
    if soft_cap is not None:
        return "cuDNN's path takes no soft cap"
    if deterministic:
        return "cuDNN's path does not promise the same bits in every run"
    if sinks:
        return "cuDNN's path takes no sinks"
    if offset or T != S:
        return f"cuDNN's path takes queries and keys that start together, not T={T}, S={S}"
    if window is not None and not isinstance(window, int):
        return "cuDNN's window is fixed when compiled, and this one is an array"
    if window is not None and not causal:
        return "cuDNN's window looks back only under a causal mask"
    return None
