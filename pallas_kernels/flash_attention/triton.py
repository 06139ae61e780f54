"""Attention by Triton kernels through jax-triton, for NVIDIA GPUs from compute capability 8.0 on.

Cost: 4 H FLOPs forward and 14 H backward for each visible pair of a query head and a key; nothing
of size [T, S] is written. Every option of the reference is taken, forward and backward, window and
q_offset traced too, T and S of any size. Gradients are the same bits in every run.
The kernels and their schedule are in `triton_source.py`; block sizes are in TILES.
XLA neither batches nor partitions the calls: no `vmap`, and shards through `shard_map`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _triton_compat

LARGEST_WINDOW = 2**30  # sums of positions stay within int32
SECTION_BYTES = 32 * 2**20  # keys and values that stay in the L2 cache together


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of q and of k a step, warps of a program, loads in flight."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Passes:
    """The tiles of each kernel."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


# By generation, then by H.
TILES = {
    "ampere": {  # up to 163 KB of shared memory a block
        64: Passes(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3)),
        128: Passes(Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 2)),
        256: Passes(Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2)),
    },
    "ada": {  # up to 99 KB
        64: Passes(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2)),
        128: Passes(Tiles(128, 32, 8, 3), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)),
        256: Passes(Tiles(64, 32, 8, 2), Tiles(32, 16, 4, 2), Tiles(16, 32, 4, 2)),
    },
    "hopper": {  # up to 227 KB, products by wgmma; 64 and 128 tuned on an H200
        64: Passes(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 128, 8, 3)),
        128: Passes(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3)),
        256: Passes(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2)),
    },
}


def generation(capability: int) -> str:
    """The key of TILES for 10 times a compute capability; Blackwell takes what surely fits."""
    if capability in (86, 89) or capability >= 120:
        return "ada"
    return "hopper" if capability == 90 else "ampere"


def refusal(
    *,
    platform: str,
    dtype,
    H: int,
    soft_cap: float | None = None,
    scale: float | None = None,
    **_others,
) -> str | None:
    """Why Triton cannot take this call, or None if it can; every other option is taken."""
    return _misfit(dtype, H, soft_cap, scale) or _triton_compat.refusal(platform)


def _misfit(dtype, H: int, soft_cap: float | None, scale: float | None) -> str | None:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernels take bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if H not in TILES["hopper"]:
        return f"the kernels take a head width of {', '.join(map(str, TILES['hopper']))}, not {H}"
    if scale is not None and scale <= 0:
        return f"the kernels take a scale above zero, not {scale}"
    if soft_cap is not None and soft_cap <= 0:
        return f"the kernels take a soft cap above zero, not {soft_cap}"
    return None


@dataclasses.dataclass(frozen=True)
class _Static:
    causal: bool
    scale: float
    soft_cap: float | None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | Int[Array, ""] | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: int | Int[Array, " B"] | Int[Array, ""] = 0,
    sinks: Float[Array, " N"] | None = None,
    deterministic: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The reference's output and log-sum-exp, and its gradients by q, k, v and sinks.

    Args:
      q, k, v: bfloat16 or float16; H of 64, 128 or 256; N a multiple of K.
      deterministic: asked or not, gradients are the same bits in every run.

    Raises:
      ValueError: a dtype, a head width, a soft cap or a scale that the kernels do not take.
    """
    del deterministic
    B, H = q.shape[0], q.shape[3]
    if reason := _misfit(q.dtype, H, soft_cap, scale):
        raise ValueError(f"attention: q{q.shape}, k{k.shape}: {reason}")
    if not q.shape[1] or not k.shape[1]:
        raise ValueError(f"attention: q{q.shape}, k{k.shape}: want a query and a key at least")
    masks: list[Array | None] = [None, None, None, None]
    if not (isinstance(q_offset, int) and q_offset == 0):
        masks[0] = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
    if window is not None:
        masks[1] = jnp.minimum(jnp.asarray(window, jnp.int32), LARGEST_WINDOW).reshape(1)
    if segment_ids is not None:
        masks[2:] = [segments.astype(jnp.int32) for segments in segment_ids]
    static = _Static(causal, H**-0.5 if scale is None else scale, soft_cap)
    return _attention(static, q, k, v, masks, sinks)


def _launch(static: _Static, q: Array, k: Array, v: Array, masks, sinks) -> tuple[Array, Array]:
    from pallas_kernels.flash_attention import triton_source

    B, T, N, H = q.shape
    tiles = TILES[generation(_triton_compat.capability())][H].forward
    out, lse = _triton_compat.call(
        triton_source.forward,
        [*_inputs(q, k, v, masks), q if sinks is None else sinks.astype(jnp.float32),
         *_sizes(q, k, B * N)],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        programs=-(-T // tiles.block_q) * B * N,
        SINKS=sinks is not None,
        **_constants(static, q, k, masks, tiles),
    )  # fmt: skip
    return out, lse


def _forward(static: _Static, q, k, v, masks, sinks):
    out, lse = _launch(static, q, k, v, masks, sinks)
    return (out, lse), (q, k, v, masks, sinks, out, lse)


def _backward(static: _Static, residuals, cotangents):
    from pallas_kernels.flash_attention import triton_source

    q, k, v, masks, sinks, out, lse = residuals
    dout, dlse = cotangents
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    delta = jnp.swapaxes(delta, 1, 2) - dlse
    passes = TILES[generation(_triton_compat.capability())][H]
    inputs = [*_inputs(q, k, v, masks), lse, delta, dout]
    (dq,) = _triton_compat.call(
        triton_source.backward_dq,
        [*inputs, *_sizes(q, k, B * N)],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        programs=-(-T // passes.dq.block_q) * B * N,
        **_constants(static, q, k, masks, passes.dq),
    )
    dk, dv = _triton_compat.call(
        triton_source.backward_dkv,
        [*inputs, *_sizes(q, k, B * K)],
        [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        programs=-(-S // passes.dkv.block_kv) * B * K,
        **_constants(static, q, k, masks, passes.dkv),
    )
    dsinks = None
    if sinks is not None:
        sink = sinks.astype(jnp.float32)[:, None]
        weights = jnp.where(sink > -jnp.inf, jnp.exp(sink - lse), 0.0)
        dsinks = -jnp.sum(weights * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, None, dsinks


_attention = jax.custom_vjp(_launch, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)


def _inputs(q: Array, k: Array, v: Array, masks) -> list[Array]:
    """What every kernel starts with; q stands in for what is not there, and is not read."""
    return [q, k, v, *(q if mask is None else mask for mask in masks)]


def _sizes(q: Array, k: Array, heads: int) -> list[int]:
    """T, S and the heads of a section: as many as have their keys and values in the L2 cache."""
    (B, T), (S, K, H) = q.shape[:2], k.shape[1:]
    fit = max(1, SECTION_BYTES // (2 * S * H * k.dtype.itemsize))
    return [T, S, min(fit * (heads // (B * K)), heads)]


def _constants(static: _Static, q: Array, k: Array, masks, tiles: Tiles) -> dict[str, Any]:
    q_offset, window, segments, _ = masks
    return {
        "N": q.shape[2],
        "K": k.shape[2],
        "H": q.shape[3],
        "SCALE": static.scale,
        "SOFT_CAP": static.soft_cap,
        "CAUSAL": static.causal,
        "WINDOW": window is not None,
        "OFFSET": q_offset is not None,
        "SEGMENTS": segments is not None,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_KV": tiles.block_kv,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
