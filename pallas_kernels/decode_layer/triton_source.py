"""A transformer layer of one token as a Triton kernel: the source, for JAX and the interpreter.

One program a multiprocessor, all at work at once. Five phases follow one another: queries, keys and
values; attention; its projection; the inner feed-forward; its projection. Between two of them all
programs meet at a counter in memory, so that none reads what another has not written. What a phase
needs and no phase makes, its first tile of weights, its first keys and values, is asked for when a
program has come and waits for the others: sooner, the fence of its coming would wait for them.

    qkv[r] = wqkv[r] . (x norm_1) / rms(x) + bias[r]                          EACH rows a program
    parts, lse: what SPLITS runs of keys give to the G queries of a key head  program k, split
    heads: their sum, made by the last program of a key head to come
    x += wo heads;  inner = silu(wg y) (wu y), y = x norm_2 / rms(x);  x += wd inner

Arrays are contiguous: x [D], qkv [(N + 2K) H], parts [SPLITS, N, H], lse [SPLITS, N] (base 2),
heads [N H], inner [F] float32; weights [out, in]; pages [P, K, PAGE, H]; table [M], and facts
(tokens with this one, where it is written: page PAGE + place, or -1) int32; counters [2 + K] int32,
zeros before and after. FIRST and LAST: phases to compute, all five or, in the interpreter, where
programs run one after another and cannot meet, one. A phase's plan is (rows of a program, rows of a
tile, columns of a tile).
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _arrive(counter_ptr):
    """Tells that the program wrote what others wait for."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l", [tl.cast(counter_ptr, tl.int64)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def _await(counter_ptr, target):
    """Waits until `target` programs told so: one thread asks, the others wait for it."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first, more;
        .reg .u32 count;
        mov.u32 count, %tid.x;
        setp.eq.u32 first, count, 0;
        @!first bra DONE;
        WAIT:
        ld.acquire.gpu.global.u32 count, [$1];
        setp.lt.u32 more, count, $2;
        @more bra WAIT;
        DONE:
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [tl.cast(counter_ptr, tl.int64), target], tl.int32, False, 1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _tile(
    w_ptr, first, end, C: tl.constexpr, start: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Rows from `first` of w [., C], below `end`, and columns from `start`; zeros past them."""
    row, col = first + tl.arange(0, ROWS), start + tl.arange(0, COLS)
    at = tl.cast(row, tl.int64)[:, None] * C + col[None, :]
    return tl.load(w_ptr + at, mask=(row < end)[:, None] & (col < C)[None, :], other=0.0)


@triton.jit
def _product(
    w_ptr, tile, first, end, v_ptr, norm_ptr, C: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Rows of w [., C] times v, which where NORM is v norm / rms(v); HELD: `tile` is the first."""
    acc = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([COLS], tl.float32)
    for start in tl.static_range(0, C, COLS):
        if HELD and start == 0:  # noqa: SIM108 (a constant condition)
            w = tile
        else:
            w = _tile(w_ptr, first, end, C, start, ROWS, COLS)
        col = start + tl.arange(0, COLS)
        v = tl.load(v_ptr + col, mask=col < C, other=0.0, cache_modifier=".cg")
        if NORM:
            squares += v * v
            v *= tl.load(norm_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        acc += tl.sum(w.to(tl.float32) * v[None, :], 1)
    if NORM:
        acc *= 1 / tl.sqrt(tl.sum(squares) / C + EPS)
    return acc


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
def _held(
    pages_ptr, table_ptr, begin, end, head,
    K: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keys or values [KEYS, H] from position `begin`, of those before `end`; zeros elsewhere."""
    key = begin + tl.arange(0, KEYS)
    page = tl.load(table_ptr + key // PAGE, mask=key < end, other=0)
    at = ((tl.cast(page, tl.int64) * K + head) * PAGE + key % PAGE)[:, None] * H
    return tl.load(pages_ptr + at + tl.arange(0, H)[None, :], mask=(key < end)[:, None], other=0.0)


@triton.jit
def _attend(
    head, split, low, high, length, k, v, qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr,
    k_ptr, v_ptr, table_ptr, slot, parts_ptr, lse_ptr, heads_ptr, counter_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, NORMED: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr,
    G: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a run of keys gives to a key head's queries; the last run to come adds all up.

    k, v: the first KEYS of those that the pages hold.
    """
    width, member = tl.arange(0, H), tl.arange(0, ROWS)
    n = head * G + member
    if low < high:
        one = tl.zeros([1], tl.int32)
        k_new = _turned(
            qkv_ptr, one + N + head, one == 0, k_norm_ptr, cos_ptr, sin_ptr, H, NORMED, EPS
        )
        k_new = k_new.to(k_ptr.dtype.element_ty)
        v_at = qkv_ptr + (N + K + head) * H + width
        v_new = tl.load(v_at, cache_modifier=".cg").to(v_ptr.dtype.element_ty)[None, :]
        q = _turned(
            qkv_ptr, head * G + member, member < G, q_norm_ptr, cos_ptr, sin_ptr, H, NORMED, EPS
        ).to(k_ptr.dtype.element_ty)
        if (high == length) & (slot >= 0):
            place = tl.cast(slot // PAGE * K + head, tl.int64) * PAGE + slot % PAGE
            at = place * H + width[None, :]
            tl.store(k_ptr + at, k_new)
            tl.store(v_ptr + at, v_new)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, H], tl.float32)
        for begin in range(low, high, KEYS):
            key = begin + tl.arange(0, KEYS)
            fresh = (key == length - 1)[:, None]
            k, v = tl.where(fresh, k_new, k), tl.where(fresh, v_new, v)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * LOG2E)
            logits = tl.where((key < high)[None, :], logits, float("-inf"))
            highest = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp2(logits - highest[:, None])
            shrink = tl.exp2(top - highest)
            total = total * shrink + tl.sum(weights, 1)
            added = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            acc = acc * shrink[:, None] + added
            top = highest
            end = tl.minimum(high, length - 1)
            k = _held(k_ptr, table_ptr, begin + KEYS, end, head, K, H, PAGE, KEYS)
            v = _held(v_ptr, table_ptr, begin + KEYS, end, head, K, H, PAGE, KEYS)
        at = parts_ptr + ((split * N + n) * H)[:, None] + width[None, :]
        tl.store(at, acc / total[:, None], mask=(member < G)[:, None])
        tl.store(lse_ptr + split * N + n, top + tl.log2(total), mask=member < G)
        run = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
        tl.debug_barrier()
        came = tl.atomic_add(counter_ptr + head, 1, sem="acq_rel")
        if came == tl.cdiv(length, run) - 1:
            tl.debug_barrier()
            splits = tl.arange(0, triton.next_power_of_2(SPLITS))
            live = splits * run < length
            for g in tl.static_range(G):
                lse = tl.load(
                    lse_ptr + splits * N + head * G + g, mask=live, other=float("-inf"),
                    cache_modifier=".cg",
                )  # fmt: skip
                share = tl.exp2(lse - tl.max(lse, 0))
                share = share / tl.sum(share, 0)
                at = parts_ptr + ((splits * N + head * G + g) * H)[:, None] + width[None, :]
                parts = tl.load(at, mask=live[:, None], other=0.0, cache_modifier=".cg")
                out = tl.sum(parts * share[:, None], 0)
                tl.store(heads_ptr + (head * G + g) * H + width, out)


@triton.jit
def _project(
    program, w_ptr, tile, v_ptr, x_ptr, D: tl.constexpr, C: tl.constexpr,
    EACH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x += w v, of a program's rows of x."""
    end = tl.minimum(program * EACH + EACH, D)
    for i in tl.static_range(0, EACH, ROWS):
        first = program * EACH + i
        row = first + tl.arange(0, ROWS)
        x = tl.load(x_ptr + row, mask=row < end, other=0.0, cache_modifier=".cg")
        y = _product(w_ptr, tile, first, end, v_ptr, v_ptr, C, ROWS, COLS, False, 0.0, i == 0)
        tl.store(x_ptr + row, x + y, mask=row < end)


@triton.jit
def layer(
    x_in, k_in, v_in, counters_in, norm_1_ptr, wqkv_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, wo_ptr,
    norm_2_ptr, wgu_ptr, wd_ptr, cos_ptr, sin_ptr, table_ptr, facts_ptr,
    x_ptr, k_ptr, v_ptr, counters_ptr, qkv_ptr, parts_ptr, lse_ptr, heads_ptr, inner_ptr,
    D: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    PAGE: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, NORMED: tl.constexpr,
    BIAS: tl.constexpr, PROGRAMS: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, EACH_QKV: tl.constexpr, ROWS_QKV: tl.constexpr, COLS_QKV: tl.constexpr,
    EACH_O: tl.constexpr, ROWS_O: tl.constexpr, COLS_O: tl.constexpr,
    EACH_GU: tl.constexpr, ROWS_GU: tl.constexpr, COLS_GU: tl.constexpr,
    EACH_D: tl.constexpr, ROWS_D: tl.constexpr, COLS_D: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """x, pages and counters as they are after the layer; `*_in` are the same arrays."""
    program = tl.program_id(0)
    TOGETHER: tl.constexpr = FIRST < LAST
    R: tl.constexpr = (N + 2 * K) * H
    head, split = program % K, program // K
    length, slot = tl.load(facts_ptr), tl.load(facts_ptr + 1)
    run = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    low = split * run
    high = tl.where(split < SPLITS, tl.minimum(low + run, length), 0)
    if FIRST <= 0:
        end = tl.minimum(program * EACH_QKV + EACH_QKV, R)
        tile = _tile(wqkv_ptr, program * EACH_QKV, end, D, 0, ROWS_QKV, COLS_QKV)
        for i in tl.static_range(0, EACH_QKV, ROWS_QKV):
            first = program * EACH_QKV + i
            row = first + tl.arange(0, ROWS_QKV)
            y = _product(
                wqkv_ptr, tile, first, end, x_ptr, norm_1_ptr, D, ROWS_QKV, COLS_QKV, True, EPS,
                i == 0,
            )  # fmt: skip
            if BIAS:
                y += tl.load(bias_ptr + row, mask=row < end, other=0.0).to(tl.float32)
            tl.store(qkv_ptr + row, y, mask=row < end)
    if TOGETHER:
        _arrive(counters_ptr)
    held = tl.minimum(high, length - 1)
    k = _held(k_ptr, table_ptr, low, held, head, K, H, PAGE, KEYS)
    v = _held(v_ptr, table_ptr, low, held, head, K, H, PAGE, KEYS)
    if TOGETHER:
        _await(counters_ptr, PROGRAMS)
    if (FIRST <= 1) & (LAST >= 1):
        _attend(
            head, split, low, high, length, k, v, qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr,
            sin_ptr, k_ptr, v_ptr, table_ptr, slot, parts_ptr, lse_ptr, heads_ptr,
            counters_ptr + 2, N, K, H, PAGE, SCALE, EPS, NORMED, SPLITS, KEYS, N // K, GROUP,
        )  # fmt: skip
    if TOGETHER:
        _arrive(counters_ptr)
    tile = _tile(
        wo_ptr, program * EACH_O, tl.minimum(program * EACH_O + EACH_O, D), N * H, 0, ROWS_O, COLS_O
    )
    if TOGETHER:
        _await(counters_ptr, 2 * PROGRAMS)
    if (FIRST <= 2) & (LAST >= 2):
        _project(program, wo_ptr, tile, heads_ptr, x_ptr, D, N * H, EACH_O, ROWS_O, COLS_O)
    if TOGETHER:
        _arrive(counters_ptr)
    end = tl.minimum(program * EACH_GU + EACH_GU, F)
    gate_tile = _tile(wgu_ptr, program * EACH_GU, end, D, 0, ROWS_GU, COLS_GU)
    up_tile = _tile(wgu_ptr + F * D, program * EACH_GU, end, D, 0, ROWS_GU, COLS_GU)
    if TOGETHER:
        _await(counters_ptr, 3 * PROGRAMS)
    if (FIRST <= 3) & (LAST >= 3):
        for i in tl.static_range(0, EACH_GU, ROWS_GU):
            first = program * EACH_GU + i
            row = first + tl.arange(0, ROWS_GU)
            gate = _product(
                wgu_ptr, gate_tile, first, end, x_ptr, norm_2_ptr, D, ROWS_GU, COLS_GU, True, EPS,
                i == 0,
            )  # fmt: skip
            up = _product(
                wgu_ptr + F * D, up_tile, first, end, x_ptr, norm_2_ptr, D, ROWS_GU, COLS_GU, True,
                EPS, i == 0,
            )  # fmt: skip
            tl.store(inner_ptr + row, gate * tl.sigmoid(gate) * up, mask=row < end)
    if TOGETHER:
        _arrive(counters_ptr)
    tile = _tile(
        wd_ptr, program * EACH_D, tl.minimum(program * EACH_D + EACH_D, D), F, 0, ROWS_D, COLS_D
    )
    if TOGETHER:
        _await(counters_ptr, 4 * PROGRAMS)
    if LAST >= 4:
        _project(program, wd_ptr, tile, inner_ptr, x_ptr, D, F, EACH_D, ROWS_D, COLS_D)
        if tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel") == PROGRAMS - 1:
            at = tl.arange(0, triton.next_power_of_2(2 + K))
            tl.store(counters_ptr + at, tl.zeros_like(at), mask=at < 2 + K)
