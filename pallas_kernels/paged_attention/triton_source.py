"""Attention over pages as Triton kernels: the source alone, for JAX, PyTorch and the interpreter.

Arrays are contiguous: q, out [T, N, H]; k_pages, v_pages [P, K, page, H]; k_scale, v_scale
[P, K, page] float32; table [B, M], starts [B + 1], lengths [B] int32; sinks [N] float32; parts
[splits, T, N, H] and lse [splits, T, N] float32, in base 2. A pointer whose option is off is never
read, nor is a page that holds no key which one of a program's queries sees.

`attend` makes what keys split * SPLIT to (split + 1) * SPLIT - 1 give to a block of one row's
queries and one key head; the G query heads that share the head lie beside the queries in one tile,
so that a key is loaded once for all. A grid of (T // BLOCK_Q + B + 1) splits K programs holds
every row's blocks whatever the rows are: row b's begin at block starts[b] // BLOCK_Q + b, and what
of the grid no row needs ends at once. Tokens after the last row are one more row, without keys.
`merge` adds the splits up in their order, T N programs.
"""

# A type checker takes this folder's triton.py for the package, which Python does not, and cannot
# see what a function that Triton compiles returns.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row(starts_ptr, place, B, BLOCK_Q: tl.constexpr, PADDED: tl.constexpr):
    """The last row that begins at or before `place`, of tokens or, if PADDED, of blocks."""
    low, high = 0, B + 1
    while low + 1 < high:
        middle = (low + high) // 2
        begin = tl.load(starts_ptr + middle)
        if PADDED:
            begin = begin // BLOCK_Q + middle
        if begin <= place:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _extent(starts_ptr, lengths_ptr, row, T, B):
    """A row's first token, how many there are, and its length; row B is what is left of T."""
    start = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1, mask=row < B, other=0)
    length = tl.load(lengths_ptr + row, mask=row < B, other=0)
    return start, tl.where(row < B, end, T) - start, length


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, starts_ptr, lengths_ptr, sinks_ptr,
    T, B, M, out_ptr, lse_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, QUANTISED: tl.constexpr, SINKS: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out of a block of queries and a key head; with more than one split, its part and lse."""
    G: tl.constexpr = N // K
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    program = tl.program_id(0)
    head, split, block = program % K, program // K % SPLITS, program // K // SPLITS
    row = _row(starts_ptr, block, B, BLOCK_Q, True)
    start, queries, length = _extent(starts_ptr, lengths_ptr, row, T, B)
    first = (block - start // BLOCK_Q - row) * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, queries) - 1
    base = length - queries  # the position of the row's first query
    low, high = 0, base + last + 1
    if SPLITS > 1:
        low, high = split * SPLIT, tl.minimum(high, split * SPLIT + SPLIT)
    if WINDOW is not None:
        low += tl.maximum(base + first - WINDOW + 1 - low, 0) // BLOCK_KV * BLOCK_KV
    if (first < queries) & ((SPLITS == 1) | (low < high)):
        member = tl.arange(0, BLOCK_M)
        query, n = first + member // G, head * G + member % G
        exists = (query < queries) & (member < BLOCK_Q * G)
        position = base + query
        at = (start + tl.cast(query, tl.int64)) * N + n
        width = tl.arange(0, H)
        q = tl.load(q_ptr + at[:, None] * H + width[None, :], mask=exists[:, None], other=0.0)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if SINKS and SPLITS == 1:
            top = tl.load(sinks_ptr + n, mask=exists, other=float("-inf")) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.zeros([BLOCK_M, H], tl.float32)
        for begin in range(low, high, BLOCK_KV):
            key = begin + tl.arange(0, BLOCK_KV)
            live = key < high
            page = tl.load(table_ptr + row * M + key // PAGE, mask=live, other=0)
            place = (tl.cast(page, tl.int64) * K + head) * PAGE + key % PAGE
            rows = place[:, None] * H + width[None, :]
            k = tl.load(k_ptr + rows, mask=live[:, None], other=0.0).to(q.dtype)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2E)
            if QUANTISED:
                logits *= tl.load(k_scale_ptr + place, mask=live, other=0.0)[None, :]
            if SOFT_CAP is not None:
                power = tl.exp2(logits * (2 / SOFT_CAP))
                logits = (1 - 2 / (power + 1)) * (SOFT_CAP * LOG2E)
            seen = live[None, :] & (key[None, :] <= position[:, None])
            if WINDOW is not None:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            logits = tl.where(seen, logits, float("-inf"))
            highest = tl.maximum(top, tl.max(logits, 1))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(logits - shift[:, None])
            shrink = tl.exp2(top - shift)
            total = total * shrink + tl.sum(weights, 1)
            if QUANTISED:
                weights *= tl.load(v_scale_ptr + place, mask=live, other=0.0)[None, :]
            v = tl.load(v_ptr + rows, mask=live[:, None], other=0.0).to(q.dtype)
            added = tl.dot(weights.to(q.dtype), v, input_precision=PRECISION)
            acc = acc * shrink[:, None] + added
            top = highest

        whole = tl.where(total > 0, total, 1.0)
        acc = acc / whole[:, None]
        at += tl.cast(split, tl.int64) * T * N
        places = out_ptr + at[:, None] * H + width[None, :]
        tl.store(places, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None])
        if SPLITS > 1:
            lse = tl.where(total > 0, top + tl.log2(whole), float("-inf"))
            tl.store(lse_ptr + at, lse, mask=exists)


@triton.jit
def merge(
    parts_ptr, lse_ptr, starts_ptr, lengths_ptr, sinks_ptr, T, B, out_ptr,
    N: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """out of one token and head: its splits that hold a key which it sees, in their order."""
    program = tl.program_id(0)
    token, n = program // N, program % N
    row = _row(starts_ptr, token, B, 1, False)
    start, queries, length = _extent(starts_ptr, lengths_ptr, row, T, B)
    position = length - queries + token - start
    low, high = 0, tl.cdiv(position + 1, SPLIT)
    if WINDOW is not None:
        low = tl.maximum(position - WINDOW + 1, 0) // SPLIT
    top, total = float("-inf"), 0.0
    if SINKS:
        top = tl.load(sinks_ptr + n) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([H], tl.float32)
    for split in range(low, high):
        at = tl.cast(split, tl.int64) * T * N + program
        lse = tl.load(lse_ptr + at)
        highest = tl.maximum(top, lse)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weight, shrink = tl.exp2(lse - shift), tl.exp2(top - shift)
        part = tl.load(parts_ptr + at * H + tl.arange(0, H))
        acc = acc * shrink + part * weight
        total = total * shrink + weight
        top = highest
    acc = acc / tl.where(total > 0, total, 1.0)
    place = out_ptr + tl.cast(program, tl.int64) * H + tl.arange(0, H)
    tl.store(place, acc.to(out_ptr.dtype.element_ty))
