"""A transformer layer of one token as a Triton kernel: the source, for JAX and the interpreter.

One program a multiprocessor, all at work at once. Five phases follow one another: queries, keys and
values; attention; its projection; the inner feed-forward; its projection. Between two of them all
programs meet at a counter in memory, so that none reads what another has not written. While a
program waits there, the weights of its next phase are on their way into the L2 cache.

    qkv[r] = wqkv[r] . (x norm_1) / rms(x) + bias[r]                          program r // ROWS
    parts, lse: what SPLITS runs of keys give to the G queries of a key head  program k, split
    heads: their sum, made by the last program of a key head to come
    x += wo heads;  inner = silu(wg y) (wu y), y = x norm_2 / rms(x);  x += wd inner

Arrays are contiguous: x [D], qkv [(N + 2K) H], parts [SPLITS, N, H], lse [SPLITS, N] (base 2),
heads [N H], inner [F] float32; weights [out, in]; pages [P, K, PAGE, H]; table [M], and facts
(tokens with this one, where it is written: page PAGE + place, or -1) int32; counters [2 + K] int32,
zeros before and after. FIRST and LAST: phases to compute, all five or, in the interpreter, where
programs run one after another and cannot meet, one.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _meet(counter_ptr, target):
    """Waits until `target` programs came."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _fetch(w_ptr, program, R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, ON: tl.constexpr):
    """Asks for a program's first rows of w [R, C], of two bytes each, in lines of 128 bytes."""
    if ON:
        COUNT: tl.constexpr = triton.next_power_of_2(ROWS * C // 64)
        line = program * (ROWS * C // 64) + tl.arange(0, COUNT)
        line = tl.minimum(line, R * C // 64 - 1)
        at = tl.cast(w_ptr + line * 64, tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.int32, False, 1
        )


@triton.jit
def _product(
    w_ptr, rows, R, v_ptr, norm_ptr, C: tl.constexpr, COLS: tl.constexpr, NORM: tl.constexpr
):
    """w[rows] . v, times norm where NORM, for rows below R."""
    acc = tl.zeros([rows.shape[0]], tl.float32)
    for start in tl.static_range(0, C, COLS):
        col = start + tl.arange(0, COLS)
        live = col < C
        at = tl.cast(rows, tl.int64)[:, None] * C + col[None, :]
        w = tl.load(w_ptr + at, mask=(rows < R)[:, None] & live[None, :], other=0.0)
        v = tl.load(v_ptr + col, mask=live, other=0.0, cache_modifier=".cg")
        if NORM:
            v *= tl.load(norm_ptr + col, mask=live, other=0.0).to(tl.float32)
        acc += tl.sum(w.to(tl.float32) * v[None, :], 1)
    return acc


@triton.jit
def _rms(x_ptr, D: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean(x^2) + EPS)."""
    WIDE: tl.constexpr = triton.next_power_of_2(D)
    at = tl.arange(0, WIDE)
    x = tl.load(x_ptr + at, mask=at < D, other=0.0, cache_modifier=".cg")
    return 1 / tl.sqrt(tl.sum(x * x) / D + EPS)


@triton.jit
def _turned(
    qkv_ptr, heads, exists, norm_ptr, cos_ptr, sin_ptr,
    H: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Heads [n, H] of qkv, normed where NORMED and rotated, float32; zeros where none exists."""
    width = tl.arange(0, H)
    other = (width + H // 2) % H
    mask = exists[:, None]
    mine = tl.load(
        qkv_ptr + heads[:, None] * H + width[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )
    pair = tl.load(
        qkv_ptr + heads[:, None] * H + other[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )
    if NORMED:
        scale = 1 / tl.sqrt(tl.sum(mine * mine, 1) / H + EPS)
        mine *= scale[:, None] * tl.load(norm_ptr + width).to(tl.float32)[None, :]
        pair *= scale[:, None] * tl.load(norm_ptr + other).to(tl.float32)[None, :]
    cos, sin = tl.load(cos_ptr + width % (H // 2)), tl.load(sin_ptr + width % (H // 2))
    sin = tl.where(width < H // 2, -sin, sin)
    return mine * cos[None, :] + pair * sin[None, :]


@triton.jit
def _attend(
    program, qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, table_ptr, facts_ptr,
    parts_ptr, lse_ptr, heads_ptr, counter_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, NORMED: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What a run of keys gives to a key head's queries; the last run to come adds all up."""
    G: tl.constexpr = N // K
    ROWS: tl.constexpr = triton.next_power_of_2(max(G, 16))
    head, split = program % K, program // K
    length, slot = tl.load(facts_ptr), tl.load(facts_ptr + 1)
    run = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    low = split * run
    high = tl.minimum(low + run, length)
    width, member = tl.arange(0, H), tl.arange(0, ROWS)
    one = tl.zeros([1], tl.int32)
    k_new = _turned(qkv_ptr, one + N + head, one == 0, k_norm_ptr, cos_ptr, sin_ptr, H, NORMED, EPS)
    k_new = k_new.to(k_ptr.dtype.element_ty)
    v_at = qkv_ptr + (N + K + head) * H + width
    v_new = tl.load(v_at, cache_modifier=".cg").to(v_ptr.dtype.element_ty)[None, :]
    if (low < length) & (high == length) & (slot >= 0):
        place = tl.cast(slot // PAGE * K + head, tl.int64) * PAGE + slot % PAGE
        at = place * H + width[None, :]
        tl.store(k_ptr + at, k_new)
        tl.store(v_ptr + at, v_new)
    q = _turned(
        qkv_ptr, head * G + member, member < G, q_norm_ptr, cos_ptr, sin_ptr, H, NORMED, EPS
    ).to(k_ptr.dtype.element_ty)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, H], tl.float32)
    for begin in range(low, high, KEYS):
        key = begin + tl.arange(0, KEYS)
        live, fresh = key < high, (key == length - 1)[:, None]
        page = tl.load(table_ptr + key // PAGE, mask=live, other=0)
        at = ((tl.cast(page, tl.int64) * K + head) * PAGE + key % PAGE)[:, None] * H
        old = live[:, None] & (key < length - 1)[:, None]
        k = tl.load(k_ptr + at + width[None, :], mask=old, other=0.0)
        v = tl.load(v_ptr + at + width[None, :], mask=old, other=0.0)
        k, v = tl.where(fresh, k_new, k), tl.where(fresh, v_new, v)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2E)
        logits = tl.where(live[None, :], logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(weights, 1)
        added = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        acc = acc * shrink[:, None] + added
        top = highest
    n = head * G + member
    if low < high:
        whole = acc / total[:, None]
        at = parts_ptr + ((split * N + n) * H)[:, None] + width[None, :]
        tl.store(at, whole, mask=(member < G)[:, None])
        tl.store(lse_ptr + split * N + n, top + tl.log2(total), mask=member < G)
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + head, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        splits = tl.arange(0, triton.next_power_of_2(SPLITS))
        live = splits * run < length
        for g in tl.static_range(G):
            n_g = head * G + g
            lse = tl.load(
                lse_ptr + splits * N + n_g, mask=live, other=float("-inf"), cache_modifier=".cg"
            )
            weights = tl.exp2(lse - tl.max(lse, 0))
            weights = weights / tl.sum(weights, 0)
            at = parts_ptr + ((splits * N + n_g) * H)[:, None] + width[None, :]
            parts = tl.load(at, mask=live[:, None], other=0.0, cache_modifier=".cg")
            out = tl.sum(parts * weights[:, None], 0)
            tl.store(heads_ptr + n_g * H + width, out)


@triton.jit
def layer(
    x_in, k_in, v_in, counters_in, norm_1_ptr, wqkv_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, wo_ptr,
    norm_2_ptr, wgu_ptr, wd_ptr, cos_ptr, sin_ptr, table_ptr, facts_ptr,
    x_ptr, k_ptr, v_ptr, counters_ptr, qkv_ptr, parts_ptr, lse_ptr, heads_ptr, inner_ptr,
    D: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    PAGE: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr,
    BIAS: tl.constexpr, PROGRAMS: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr,
    ROWS_QKV: tl.constexpr, ROWS_O: tl.constexpr, ROWS_GU: tl.constexpr, ROWS_D: tl.constexpr,
    COLS: tl.constexpr, AHEAD: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """x, pages and counters as they are after the layer; `*_in` are the same arrays."""
    program = tl.program_id(0)
    TOGETHER: tl.constexpr = FIRST < LAST
    R: tl.constexpr = (N + 2 * K) * H
    if FIRST <= 0:
        _fetch(wo_ptr, program, D, N * H, ROWS_O, AHEAD)
        scale = _rms(x_ptr, D, EPS)
        for first in range(program * ROWS_QKV, R, PROGRAMS * ROWS_QKV):
            rows = first + tl.arange(0, ROWS_QKV)
            y = _product(wqkv_ptr, rows, R, x_ptr, norm_1_ptr, D, COLS, True) * scale
            if BIAS:
                y += tl.load(bias_ptr + rows, mask=rows < R, other=0.0).to(tl.float32)
            tl.store(qkv_ptr + rows, y, mask=rows < R)
    if TOGETHER:
        _meet(counters_ptr, PROGRAMS)
    if (FIRST <= 1) & (LAST >= 1):
        _fetch(wgu_ptr, program, 2 * F, D, ROWS_GU, AHEAD)
        _fetch(wgu_ptr + F * D, program, F, D, ROWS_GU, AHEAD)
        if program < K * SPLITS:
            _attend(
                program, qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr,
                table_ptr, facts_ptr, parts_ptr, lse_ptr, heads_ptr, counters_ptr + 2,
                N, K, H, PAGE, SCALE, EPS, NORMED, SPLITS, KEYS,
            )  # fmt: skip
    if TOGETHER:
        _meet(counters_ptr, 2 * PROGRAMS)
    if (FIRST <= 2) & (LAST >= 2):
        _fetch(wd_ptr, program, D, F, ROWS_D, AHEAD)
        for first in range(program * ROWS_O, D, PROGRAMS * ROWS_O):
            rows = first + tl.arange(0, ROWS_O)
            y = _product(wo_ptr, rows, D, heads_ptr, heads_ptr, N * H, COLS, False)
            x = tl.load(x_ptr + rows, mask=rows < D, other=0.0, cache_modifier=".cg")
            tl.store(x_ptr + rows, x + y, mask=rows < D)
    if TOGETHER:
        _meet(counters_ptr, 3 * PROGRAMS)
    if (FIRST <= 3) & (LAST >= 3):
        scale = _rms(x_ptr, D, EPS)
        for first in range(program * ROWS_GU, F, PROGRAMS * ROWS_GU):
            rows = first + tl.arange(0, ROWS_GU)
            gate = _product(wgu_ptr, rows, F, x_ptr, norm_2_ptr, D, COLS, True) * scale
            up = _product(wgu_ptr + F * D, rows, F, x_ptr, norm_2_ptr, D, COLS, True) * scale
            tl.store(inner_ptr + rows, gate * tl.sigmoid(gate) * up, mask=rows < F)
    if TOGETHER:
        _meet(counters_ptr, 4 * PROGRAMS)
    if LAST >= 4:
        for first in range(program * ROWS_D, D, PROGRAMS * ROWS_D):
            rows = first + tl.arange(0, ROWS_D)
            y = _product(wd_ptr, rows, D, inner_ptr, inner_ptr, F, COLS, False)
            x = tl.load(x_ptr + rows, mask=rows < D, other=0.0, cache_modifier=".cg")
            tl.store(x_ptr + rows, x + y, mask=rows < D)
        if tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel") == PROGRAMS - 1:
            at = tl.arange(0, triton.next_power_of_2(2 + K))
            tl.store(counters_ptr + at, tl.zeros_like(at), mask=at < 2 + K)
