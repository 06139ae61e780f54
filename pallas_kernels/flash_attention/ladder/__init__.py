"""Attention on Hopper, one idea a step, each interpreted on a laptop as well.

    standard  three passes; logits and weights lie in memory
    flash_1   the softmax goes along the keys, one block of them at a time for all queries
    flash_2   queries outside: sums stay in registers, and every block of queries runs by itself
    flash_3   one warpgroup copies, two take turns, each with products under its softmax

All of them are softmax(q k^T / sqrt(H)) v without a mask. `account` counts what each moves.
"""

from __future__ import annotations

import dataclasses

STEPS = ("standard", "flash_1", "flash_2", "flash_3")


@dataclasses.dataclass(frozen=True)
class Account:
    """FLOPs of the products; bytes that blocks ask memory and its cache for; bytes of scratch."""

    flops: int
    asked: int
    scratch: int


def account(step: str, B: int, T: int, S: int, N: int, H: int) -> Account:
    """What `step` does for q [B, T, N, H] and k, v [B, S, N, H] of 16-bit floats."""
    from pallas_kernels.flash_attention.ladder import flash_1, flash_2, flash_3

    heads, q_bytes, k_bytes = B * N, 2 * T * H, 2 * S * H
    flops = 4 * heads * T * S * H
    if step == "standard":  # logits in float32 written and read, weights in 16 bits as well
        once = 2 * q_bytes + 2 * k_bytes
        return Account(flops, heads * (once + 2 * 4 * T * S + 2 * 2 * T * S), heads * 6 * T * S)
    if step == "flash_1":  # each block of keys sees all queries: q, and the sums in and out
        sums = 4 * T * (H + 2)
        visits = S // flash_1.BLOCK_KV
        asked = 2 * k_bytes + visits * (q_bytes + 2 * sums) + sums
        return Account(flops, heads * asked, heads * sums)
    rows = {"flash_2": flash_2.BLOCK_Q, "flash_3": flash_3.WARPGROUPS * flash_3.BLOCK_Q}[step]
    return Account(flops, heads * (2 * q_bytes + T // rows * 2 * k_bytes), 0)


def check(q, k, v, rows: int, block_kv: int) -> None:
    """Raises ValueError where q, k and v are not what a step takes."""
    import jax.numpy as jnp

    if q.ndim != 4 or k.shape != v.shape or k.shape[:1] + k.shape[2:] != q.shape[:1] + q.shape[2:]:
        raise ValueError(
            f"attention: q{q.shape}, k{k.shape}, v{v.shape}; want [B,T,N,H], [B,S,N,H] twice"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"attention: {q.dtype}, {k.dtype}, {v.dtype}; want all bfloat16 or all float16"
        )
    if q.shape[3] not in (64, 128):
        raise ValueError(f"attention: H={q.shape[3]}; a step takes 64 and 128")
    for name, size, block in (("T", q.shape[1], rows), ("S", k.shape[1], block_kv)):
        if size % block:
            raise ValueError(f"attention: {name}={size} is not a multiple of {block}")
