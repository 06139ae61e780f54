"""New tokens' queries, and their keys and values in pages: the Triton source.

A program takes one token: all heads of its row of qkv [T, (N + 2K) H], the lower and the upper half
of each apart. Arrays are contiguous: cos and sin [T, H / 2] float32, bias [(N + 2K) H], norms [H],
slots [T] int32 (page PAGE + place, below zero: the keys and values go nowhere), q [T, N, H], pages
[P, K, PAGE, H]; `*_in` are the pages as they came, the same memory.
"""

# A type checker takes this folder's triton.py for the package; Python does not.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def _halves(ptr, bias_ptr, at, live, H: tl.constexpr, BIAS: tl.constexpr):
    """The halves of heads, rounded as the sum with the bias is; float32."""
    low = tl.load(ptr + at, mask=live, other=0.0)
    high = tl.load(ptr + at + H // 2, mask=live, other=0.0)
    if BIAS:
        low += tl.load(bias_ptr + at, mask=live, other=0.0).to(low.dtype)
        high += tl.load(bias_ptr + at + H // 2, mask=live, other=0.0).to(high.dtype)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _weights(q_norm_ptr, k_norm_ptr, is_query, pair, START: tl.constexpr, PLUS_ONE: tl.constexpr):
    """What the norms multiply by: that of queries in their rows, that of keys in the others."""
    of_query = tl.load(q_norm_ptr + START + pair)[None, :]
    of_key = tl.load(k_norm_ptr + START + pair)[None, :]
    weight = tl.where(is_query[:, None], of_query, of_key).to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    return weight


@triton.jit
def write(
    qkv_ptr, k_in, v_in, cos_ptr, sin_ptr, slots_ptr, bias_ptr, q_norm_ptr, k_norm_ptr,
    q_ptr, k_ptr, v_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr, BIAS: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """One token's row."""
    token = tl.cast(tl.program_id(0), tl.int64)
    row_ptr = qkv_ptr + token * (N + 2 * K) * H
    slot = tl.load(slots_ptr + token)
    pair = tl.arange(0, H // 2)
    page = tl.cast(slot // PAGE, tl.int64) * K * PAGE + slot % PAGE  # of head 0, in rows of H

    head = tl.arange(0, HEADS)
    at = head[:, None] * H + pair[None, :]
    low, high = _halves(row_ptr, bias_ptr, at, (head < N + K)[:, None], H, BIAS)
    if NORMED:
        scale = 1 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / H + EPS)
        low *= scale[:, None] * _weights(q_norm_ptr, k_norm_ptr, head < N, pair, 0, PLUS_ONE)
        high *= scale[:, None] * _weights(q_norm_ptr, k_norm_ptr, head < N, pair, H // 2, PLUS_ONE)
    cos = tl.load(cos_ptr + token * (H // 2) + pair)[None, :]
    sin = tl.load(sin_ptr + token * (H // 2) + pair)[None, :]
    low, high = low * cos - high * sin, high * cos + low * sin
    live = (head < N)[:, None]
    tl.store(q_ptr + token * N * H + at, low.to(q_ptr.dtype.element_ty), mask=live)
    tl.store(q_ptr + token * N * H + at + H // 2, high.to(q_ptr.dtype.element_ty), mask=live)
    if slot >= 0:
        is_key = ((head >= N) & (head < N + K))[:, None]
        to = (page + (head - N) * PAGE)[:, None] * H + pair[None, :]
        tl.store(k_ptr + to, low.to(k_ptr.dtype.element_ty), mask=is_key)
        tl.store(k_ptr + to + H // 2, high.to(k_ptr.dtype.element_ty), mask=is_key)
        key = tl.arange(0, KEY_HEADS)
        exists = (key < K)[:, None]
        source = (N + K + key)[:, None] * H + pair[None, :]
        v_low, v_high = _halves(row_ptr, bias_ptr, source, exists, H, BIAS)
        place = (page + key * PAGE)[:, None] * H + pair[None, :]
        tl.store(v_ptr + place, v_low.to(v_ptr.dtype.element_ty), mask=exists)
        tl.store(v_ptr + place + H // 2, v_high.to(v_ptr.dtype.element_ty), mask=exists)
