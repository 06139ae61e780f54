"""FlashAttention-2 as Triton kernels: the source alone, for JAX, for PyTorch, for the interpreter.

Arrays are contiguous: q, out, dout, dq [B, T, N, H]; k, v, dk, dv [B, S, K, H]; lse, delta
[B, N, T] float32; q_offset [B], window [1], segments [B, T] and [B, S] int32; sinks [N] float32.
A pointer whose option is off is never read. The grid has one axis, of ceil(T / BLOCK_Q) B N
programs (`forward`, `backward_dq`) or ceil(S / BLOCK_KV) B K (`backward_dkv`).

Cost, of each visible pair of a query head and a key: 4 H FLOPs forward, 14 H backward (5 products
of which 2 are made twice, so that dq needs no atomic sums and every run gives the same bits).
Schedule: a program holds one block and loops over the others; blocks that every row sees in full
take no mask; the longest programs of a section of heads start first, and a section's keys and
values fit the L2 cache. Softmax is in base 2 with the scale folded into one multiply-add.
Algorithm: arXiv 2307.08691.
"""

# A type checker takes this folder's triton.py for the package, which Python does not, and cannot
# see what a function that Triton compiles returns.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(blocks, section, REVERSED: tl.constexpr):
    """This program's block and head: sections of heads, in each all heads of a block together."""
    program = tl.program_id(0)
    first = program // (section * blocks) * section
    within = program - first * blocks
    heads = tl.minimum(section, tl.num_programs(0) // blocks - first)
    block = within // heads
    if REVERSED:
        block = blocks - 1 - block
    return block, first + within % heads


@triton.jit
def _rows(base, start, limit, STRIDE: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr):
    """Pointers to rows `start` and on of a head, and which of them exist."""
    rows = tl.arange(0, ROWS)
    offsets = rows[:, None] * STRIDE + tl.arange(0, H)[None, :]
    return base + tl.cast(start, tl.int64) * STRIDE + offsets, (start + rows < limit)[:, None]


@triton.jit
def _load(base, start, limit, STRIDE: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr,
          EDGE: tl.constexpr):  # fmt: skip
    """Rows of a head [ROWS, H]; zeros past the edge."""
    rows, exist = _rows(base, start, limit, STRIDE, ROWS, H)
    if EDGE:
        return tl.load(rows, mask=exist, other=0.0)
    return tl.load(rows)


@triton.jit
def _position(q_offset_ptr, window_ptr, batch, OFFSET: tl.constexpr, WINDOW: tl.constexpr):
    """The position of query 0 among the keys, and the window."""
    offset, window = 0, 0
    if OFFSET:
        offset = tl.load(q_offset_ptr + batch)
    if WINDOW:
        window = tl.load(window_ptr)
    return offset, window


@triton.jit
def _key_range(first, last, S, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
               WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
    """Keys seen from positions first to last: from, unmasked from, unmasked to, to."""
    low, high = 0, S
    full_low, full_high = 0, S // BLOCK * BLOCK
    if CAUSAL:
        high = tl.minimum(high, last + 1)
        full_high = tl.minimum(full_high, tl.maximum(first + 1, 0) // BLOCK * BLOCK)
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // BLOCK * BLOCK
        full_low = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK) * BLOCK
    if SEGMENTS:
        full_low = full_high
    some = full_low < full_high
    return low, tl.where(some, full_low, low), tl.where(some, full_high, low), high


@triton.jit
def _query_range(first, last, T, offset, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
                 WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
    """Queries that see keys first to last: from, unmasked from, unmasked to, to."""
    low, high = 0, T
    full_low, full_high = 0, T // BLOCK * BLOCK
    if CAUSAL:
        low = tl.maximum(first - offset, 0) // BLOCK * BLOCK
        full_low = tl.cdiv(tl.maximum(last - offset, 0), BLOCK) * BLOCK
    if WINDOW:
        high = tl.minimum(high, last + window - offset)
        full_high = tl.minimum(full_high, tl.maximum(first + window - offset, 0) // BLOCK * BLOCK)
    if SEGMENTS:
        full_low = full_high
    some = full_low < full_high
    return low, tl.where(some, full_low, low), tl.where(some, full_high, low), high


@triton.jit
def _visible(positions, keys, q_segments, kv_segments, S, window, CAUSAL: tl.constexpr,
             WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
    """Which pairs of a query's position and a key the mask lets through."""
    limit = S
    if CAUSAL:
        limit = tl.minimum(positions + 1, S)
    visible = keys < limit
    if WINDOW:
        visible = visible & (keys > positions - window)
    if SEGMENTS:
        visible = visible & (q_segments == kv_segments)
    return visible


@triton.jit
def _visible_keys(
    start, positions, q_segments, kv_segments_ptr, S, window, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """`_visible` for queries [BLOCK_Q] against the block of keys from `start` on."""
    keys = start + tl.arange(0, BLOCK_KV)
    kv_segments = keys
    if SEGMENTS:
        kv_segments = tl.load(kv_segments_ptr + keys, mask=keys < S, other=0)
    return _visible(positions[:, None], keys[None, :], q_segments[:, None], kv_segments[None, :],
                    S, window, CAUSAL, WINDOW, SEGMENTS)  # fmt: skip


@triton.jit
def _logits(products, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Logits in units of `_unit`: the products, or tanh of the capped ones."""
    if SOFT_CAP is not None:
        e = tl.exp2(products * (2 * SCALE / SOFT_CAP * LOG2E))
        return 1 - 2 / (e + 1)
    return products


@triton.jit
def _unit(SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """What a logit of 1 from `_logits` is worth in base 2."""
    if SOFT_CAP is not None:
        return SOFT_CAP * LOG2E
    return SCALE * LOG2E


@triton.jit
def _forward_blocks(
    acc, total, top, q, low, high, k_base, v_base, kv_segments_ptr, positions, q_segments, S,
    window, K: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """One pass of the online softmax over blocks of keys low to high."""
    unit = _unit(SCALE, SOFT_CAP)
    for start in range(low, high, BLOCK_KV):
        k = _load(k_base, start, S, K * H, BLOCK_KV, H, MASKED)
        logits = _logits(tl.dot(q, tl.trans(k)), SCALE, SOFT_CAP)
        if MASKED:
            visible = _visible_keys(start, positions, q_segments, kv_segments_ptr, S, window,
                                    CAUSAL, WINDOW, SEGMENTS, BLOCK_KV)  # fmt: skip
            logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1) * unit)
        shift = new_top
        if MASKED:
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits * unit - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        v = _load(v_base, start, S, K * H, BLOCK_KV, H, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    return acc, total, top


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, q_offset_ptr, window_ptr, q_segments_ptr, kv_segments_ptr, sinks_ptr,
    T, S, section, out_ptr, lse_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OFFSET: tl.constexpr,
    SEGMENTS: tl.constexpr, SINKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of queries of one head."""
    block, head = _place(tl.cdiv(T, BLOCK_Q), section, CAUSAL)
    batch, n = tl.cast(head // N, tl.int64), head % N
    offset, window = _position(q_offset_ptr, window_ptr, batch, OFFSET, WINDOW)
    start = block * BLOCK_Q
    t = start + tl.arange(0, BLOCK_Q)
    positions = t + offset
    q_segments = t
    if SEGMENTS:
        q_segments = tl.load(q_segments_ptr + batch * T + t, mask=t < T, other=0)
    kv_segments_ptr += batch * S
    q = _load(q_ptr + batch * T * N * H + n * H, start, T, N * H, BLOCK_Q, H, True)
    kv_offset = batch * S * K * H + n // (N // K) * H
    k_base, v_base = k_ptr + kv_offset, v_ptr + kv_offset

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    if SINKS:
        top = tl.zeros([BLOCK_Q], tl.float32) + tl.load(sinks_ptr + n) * LOG2E
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_Q, H], tl.float32)
    last = tl.minimum(start + BLOCK_Q, T) - 1 + offset
    bounds = _key_range(start + offset, last, S, window, BLOCK_KV, CAUSAL, WINDOW, SEGMENTS)
    for part in tl.static_range(3):
        if WINDOW or part > 0:
            acc, total, top = _forward_blocks(
                acc, total, top, q, bounds[part], bounds[part + 1], k_base, v_base, kv_segments_ptr,
                positions, q_segments, S, window, K, H, SCALE, SOFT_CAP, CAUSAL, WINDOW, SEGMENTS,
                part != 1, BLOCK_KV,
            )  # fmt: skip
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, float("-inf"))
    tl.store(lse_ptr + tl.cast(head, tl.int64) * T + t, lse, mask=t < T)
    rows, exist = _rows(out_ptr + batch * T * N * H + n * H, start, T, N * H, BLOCK_Q, H)
    tl.store(rows, acc.to(out_ptr.dtype.element_ty), mask=exist)


@triton.jit
def _slopes(products, dweights, lse, delta, visible, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """The softmax weights again, and the slopes of the loss by the products, short of SCALE."""
    logits = _logits(products, SCALE, SOFT_CAP)
    weights = tl.exp2(logits * _unit(SCALE, SOFT_CAP) - lse)
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    slopes = weights * (dweights - delta)
    if SOFT_CAP is not None:
        slopes = slopes * (1 - logits * logits)
    return weights, slopes


@triton.jit
def _load_rows(lse_ptr, delta_ptr, t, T):
    """lse in base 2 and delta of queries t; a query that sees nothing gets weights of zero."""
    lse = tl.load(lse_ptr + t, mask=t < T, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse * LOG2E, tl.load(delta_ptr + t, mask=t < T, other=0.0)


@triton.jit
def _dq_blocks(
    dq, q, dout, lse, delta, low, high, k_base, v_base, kv_segments_ptr, positions, q_segments, S,
    window, K: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, over blocks of keys low to high."""
    for start in range(low, high, BLOCK_KV):
        k = _load(k_base, start, S, K * H, BLOCK_KV, H, MASKED)
        v = _load(v_base, start, S, K * H, BLOCK_KV, H, MASKED)
        visible = True
        if MASKED:
            visible = _visible_keys(start, positions, q_segments, kv_segments_ptr, S, window,
                                    CAUSAL, WINDOW, SEGMENTS, BLOCK_KV)  # fmt: skip
        _, slopes = _slopes(tl.dot(q, tl.trans(k)), tl.dot(dout, tl.trans(v)), lse[:, None],
                            delta[:, None], visible, SCALE, SOFT_CAP, MASKED)  # fmt: skip
        dq = tl.dot(slopes.to(k.dtype), k, dq)
    return dq


@triton.jit
def backward_dq(
    q_ptr, k_ptr, v_ptr, q_offset_ptr, window_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr,
    delta_ptr, dout_ptr, T, S, section, dq_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OFFSET: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head; delta is rowsum(out dout) - dlse."""
    block, head = _place(tl.cdiv(T, BLOCK_Q), section, CAUSAL)
    batch, n = tl.cast(head // N, tl.int64), head % N
    offset, window = _position(q_offset_ptr, window_ptr, batch, OFFSET, WINDOW)
    start = block * BLOCK_Q
    t = start + tl.arange(0, BLOCK_Q)
    positions = t + offset
    q_segments = t
    if SEGMENTS:
        q_segments = tl.load(q_segments_ptr + batch * T + t, mask=t < T, other=0)
    kv_segments_ptr += batch * S
    q_offset = batch * T * N * H + n * H
    q = _load(q_ptr + q_offset, start, T, N * H, BLOCK_Q, H, True)
    dout = _load(dout_ptr + q_offset, start, T, N * H, BLOCK_Q, H, True)
    row = tl.cast(head, tl.int64) * T
    lse, delta = _load_rows(lse_ptr + row, delta_ptr + row, t, T)
    kv_offset = batch * S * K * H + n // (N // K) * H
    k_base, v_base = k_ptr + kv_offset, v_ptr + kv_offset

    dq = tl.zeros([BLOCK_Q, H], tl.float32)
    last = tl.minimum(start + BLOCK_Q, T) - 1 + offset
    bounds = _key_range(start + offset, last, S, window, BLOCK_KV, CAUSAL, WINDOW, SEGMENTS)
    for part in tl.static_range(3):
        if WINDOW or part > 0:
            dq = _dq_blocks(
                dq, q, dout, lse, delta, bounds[part], bounds[part + 1], k_base, v_base,
                kv_segments_ptr, positions, q_segments, S, window, K, H, SCALE, SOFT_CAP, CAUSAL,
                WINDOW, SEGMENTS, part != 1, BLOCK_KV,
            )  # fmt: skip
    rows, exist = _rows(dq_ptr + q_offset, start, T, N * H, BLOCK_Q, H)
    tl.store(rows, (dq * SCALE).to(dq_ptr.dtype.element_ty), mask=exist)


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, low, high, q_base, dout_base, lse_ptr, delta_ptr, q_segments_ptr, keys,
    kv_segments, T, S, offset, window, N: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, over blocks of one head's queries low to high."""
    for start in range(low, high, BLOCK_Q):
        t = start + tl.arange(0, BLOCK_Q)
        q = _load(q_base, start, T, N * H, BLOCK_Q, H, MASKED)
        dout = _load(dout_base, start, T, N * H, BLOCK_Q, H, MASKED)
        lse, delta = _load_rows(lse_ptr, delta_ptr, t, T)
        visible = True
        if MASKED:
            q_segments = t
            if SEGMENTS:
                q_segments = tl.load(q_segments_ptr + t, mask=t < T, other=0)
            visible = _visible((t + offset)[None, :], keys[:, None], q_segments[None, :],
                               kv_segments[:, None], S, window, CAUSAL, WINDOW,
                               SEGMENTS)  # fmt: skip
        weights, slopes = _slopes(tl.dot(k, tl.trans(q)), tl.dot(v, tl.trans(dout)), lse[None, :],
                                  delta[None, :], visible, SCALE, SOFT_CAP, MASKED)  # fmt: skip
        dv = tl.dot(weights.to(dout.dtype), dout, dv)
        dk = tl.dot(slopes.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def backward_dkv(
    q_ptr, k_ptr, v_ptr, q_offset_ptr, window_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr,
    delta_ptr, dout_ptr, T, S, section, dk_ptr, dv_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OFFSET: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head, summed over its group of query heads."""
    block, head = _place(tl.cdiv(S, BLOCK_KV), section, False)
    batch, kv_head = tl.cast(head // K, tl.int64), head % K
    offset, window = _position(q_offset_ptr, window_ptr, batch, OFFSET, WINDOW)
    start = block * BLOCK_KV
    keys = start + tl.arange(0, BLOCK_KV)
    kv_segments = keys
    if SEGMENTS:
        kv_segments = tl.load(kv_segments_ptr + batch * S + keys, mask=keys < S, other=0)
    q_segments_ptr += batch * T
    kv_offset = batch * S * K * H + kv_head * H
    k = _load(k_ptr + kv_offset, start, S, K * H, BLOCK_KV, H, True)
    v = _load(v_ptr + kv_offset, start, S, K * H, BLOCK_KV, H, True)
    last = tl.minimum(start + BLOCK_KV, S) - 1
    bounds = _query_range(start, last, T, offset, window, BLOCK_Q, CAUSAL, WINDOW, SEGMENTS)

    dk = tl.zeros([BLOCK_KV, H], tl.float32)
    dv = tl.zeros([BLOCK_KV, H], tl.float32)
    for g in range(N // K):
        n = kv_head * (N // K) + g
        q_base = q_ptr + batch * T * N * H + n * H
        dout_base = dout_ptr + batch * T * N * H + n * H
        row = (batch * N + n) * T
        for part in tl.static_range(3):
            if CAUSAL or part > 0:
                dk, dv = _dkv_blocks(
                    dk, dv, k, v, bounds[part], bounds[part + 1], q_base, dout_base, lse_ptr + row,
                    delta_ptr + row, q_segments_ptr, keys, kv_segments, T, S, offset, window, N, H,
                    SCALE, SOFT_CAP, CAUSAL, WINDOW, SEGMENTS, part != 1, BLOCK_Q,
                )  # fmt: skip
    rows, exist = _rows(dk_ptr + kv_offset, start, S, K * H, BLOCK_KV, H)
    tl.store(rows, (dk * SCALE).to(dk_ptr.dtype.element_ty), mask=exist)
    rows, exist = _rows(dv_ptr + kv_offset, start, S, K * H, BLOCK_KV, H)
    tl.store(rows, dv.to(dv_ptr.dtype.element_ty), mask=exist)
