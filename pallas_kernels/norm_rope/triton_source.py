"""Norms and rotation of heads as Triton kernels: the source, for JAX and the interpreter.

Arrays are contiguous: q [M, N, H], k [M, K, H], cos and sin [M, H / 2] float32, norms [H], parts
[PROGRAMS, H] float32. A program holds all heads of TOKENS positions, the lower and the upper half
of each apart. A pair's halves turn together: (low cos - high sin, high cos + low sin).
"""

# A type checker takes this folder's triton.py for the package; Python does not.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def _angles(ptr, tokens, M, H: tl.constexpr, HALF: tl.constexpr):
    pair = tl.arange(0, HALF)
    at = tl.cast(tokens, tl.int64)[:, None] * (H // 2) + pair[None, :]
    live = (tokens < M)[:, None] & (pair < H // 2)[None, :]
    return tl.load(ptr + at, mask=live, other=0.0)[:, None, :]


@triton.jit
def _places(tokens, M, N: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr):
    """Where the lower halves of heads [TOKENS, HEADS, HALF] lie, and which exist."""
    head, pair = tl.arange(0, HEADS), tl.arange(0, HALF)
    at = ((tl.cast(tokens, tl.int64)[:, None] * N + head[None, :]) * H)[:, :, None]
    live = ((tokens < M)[:, None] & (head < N)[None, :])[:, :, None]
    return at + pair[None, None, :], live & (pair < H // 2)[None, None, :]


@triton.jit
def _halves(ptr, at, live, H: tl.constexpr):
    low = tl.load(ptr + at, mask=live, other=0.0).to(tl.float32)
    return low, tl.load(ptr + at + H // 2, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, at, live, low, high, H: tl.constexpr):
    tl.store(ptr + at, low.to(ptr.dtype.element_ty), mask=live)
    tl.store(ptr + at + H // 2, high.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def _weights(ptr, H: tl.constexpr, HALF: tl.constexpr, PLUS_ONE: tl.constexpr):
    pair = tl.arange(0, HALF)
    low = tl.load(ptr + pair, mask=pair < H // 2, other=0.0).to(tl.float32)
    high = tl.load(ptr + pair + H // 2, mask=pair < H // 2, other=0.0).to(tl.float32)
    if PLUS_ONE:
        low, high = low + 1.0, high + 1.0
    return low[None, None, :], high[None, None, :]


@triton.jit
def _scale(low, high, H: tl.constexpr, EPS: tl.constexpr):
    """What a norm multiplies each head by."""
    return tl.rsqrt((tl.sum(low * low, 2) + tl.sum(high * high, 2)) / H + EPS)[:, :, None]


@triton.jit
def _turned(
    x_ptr, norm_ptr, out_ptr, tokens, M, cos, sin, N: tl.constexpr, HEADS: tl.constexpr,
    H: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):  # fmt: skip
    at, live = _places(tokens, M, N, HEADS, H, HALF)
    low, high = _halves(x_ptr, at, live, H)
    if NORMED:
        scale = _scale(low, high, H, EPS)
        low_weight, high_weight = _weights(norm_ptr, H, HALF, PLUS_ONE)
        low, high = low * scale * low_weight, high * scale * high_weight
    _store(out_ptr, at, live, low * cos - high * sin, high * cos + low * sin, H)


@triton.jit
def forward(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, M, q_out_ptr, k_out_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, NORMED: tl.constexpr,
    EPS: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """All heads of a few positions, normed and turned."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cos, sin = _angles(cos_ptr, tokens, M, H, HALF), _angles(sin_ptr, tokens, M, H, HALF)
    _turned(q_ptr, q_norm_ptr, q_out_ptr, tokens, M, cos, sin, N, Q_HEADS, H, HALF, NORMED, EPS,
            PLUS_ONE)  # fmt: skip
    _turned(k_ptr, k_norm_ptr, k_out_ptr, tokens, M, cos, sin, K, K_HEADS, H, HALF, NORMED, EPS,
            PLUS_ONE)  # fmt: skip


@triton.jit
def _returned(
    x_ptr, slope_ptr, dx_ptr, low_weight, high_weight, tokens, M, cos, sin, N: tl.constexpr,
    HEADS: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Stores a gradient; the parts of the weight's, [HALF] each."""
    at, live = _places(tokens, M, N, HEADS, H, HALF)
    low, high = _halves(x_ptr, at, live, H)
    low_out, high_out = _halves(slope_ptr, at, live, H)
    low_turned, high_turned = low_out * cos + high_out * sin, high_out * cos - low_out * sin
    scale = _scale(low, high, H, EPS)
    low, high = low * scale, high * scale
    low_slope, high_slope = low_turned * low_weight, high_turned * high_weight
    along = (tl.sum(low_slope * low, 2) + tl.sum(high_slope * high, 2))[:, :, None] / H
    low_dx, high_dx = scale * (low_slope - low * along), scale * (high_slope - high * along)
    _store(dx_ptr, at, live, low_dx, high_dx, H)
    low_part, high_part = low_turned * low, high_turned * high
    return tl.sum(tl.sum(low_part, 1), 0), tl.sum(tl.sum(high_part, 1), 0)


@triton.jit
def backward(
    q_ptr, k_ptr, q_slope_ptr, k_slope_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, M,
    dq_ptr, dk_ptr, q_parts_ptr, k_parts_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, EPS: tl.constexpr,
    PLUS_ONE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """dq and dk of a share of the positions, and that share's parts of the norms' gradients."""
    program = tl.program_id(0)
    q_low, q_high = _weights(q_norm_ptr, H, HALF, PLUS_ONE)
    k_low, k_high = _weights(k_norm_ptr, H, HALF, PLUS_ONE)
    q_low_part, q_high_part = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    k_low_part, k_high_part = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for block in range(program, tl.cdiv(M, TOKENS), PROGRAMS):
        tokens = block * TOKENS + tl.arange(0, TOKENS)
        cos, sin = _angles(cos_ptr, tokens, M, H, HALF), _angles(sin_ptr, tokens, M, H, HALF)
        low, high = _returned(q_ptr, q_slope_ptr, dq_ptr, q_low, q_high, tokens, M, cos, sin, N,
                              Q_HEADS, H, HALF, EPS)  # fmt: skip
        q_low_part, q_high_part = q_low_part + low, q_high_part + high
        low, high = _returned(k_ptr, k_slope_ptr, dk_ptr, k_low, k_high, tokens, M, cos, sin, K,
                              K_HEADS, H, HALF, EPS)  # fmt: skip
        k_low_part, k_high_part = k_low_part + low, k_high_part + high
    pair = tl.arange(0, HALF)
    at, exist = program * H + pair, pair < H // 2
    _store(q_parts_ptr, at, exist, q_low_part, q_high_part, H)
    _store(k_parts_ptr, at, exist, k_low_part, k_high_part, H)
