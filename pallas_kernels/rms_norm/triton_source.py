"""Norms of rows as Triton kernels: the source, for JAX and the interpreter.

Arrays are contiguous: rows [M, D], weight [D], parts [PROGRAMS, D] float32. A program holds tiles
of ROWS whole rows, WIDE columns of which the first D exist, in registers; sums are float32.
"""

# A type checker takes this folder's triton.py for the package; Python does not.
# pyright: reportAttributeAccessIssue=false
import triton
import triton.language as tl


@triton.jit
def _weight(weight_ptr, columns, D: tl.constexpr, PLUS_ONE: tl.constexpr):
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    return weight + 1.0 if PLUS_ONE else weight


@triton.jit
def forward(
    x_ptr, residual_ptr, weight_ptr, M, total_ptr, out_ptr,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
    PLUS_ONE: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """The norm of x, or of total = x + residual."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    at = tl.cast(rows, tl.int64)[:, None] * D + columns[None, :]
    live = (rows < M)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=live)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    out = x * scale[:, None] * _weight(weight_ptr, columns, D, PLUS_ONE)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def backward(
    total_ptr, dtotal_ptr, dout_ptr, weight_ptr, M, dx_ptr, parts_ptr,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
    PLUS_ONE: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of a share of the rows, and that share's part of the weight's gradient."""
    columns = tl.arange(0, WIDE)
    weight = _weight(weight_ptr, columns, D, PLUS_ONE)
    part = tl.zeros([ROWS, WIDE], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), PROGRAMS, num_stages=STAGES):
        rows = block * ROWS + tl.arange(0, ROWS)
        at = tl.cast(rows, tl.int64)[:, None] * D + columns[None, :]
        live = (rows < M)[:, None] & (columns < D)[None, :]
        x = tl.load(total_ptr + at, mask=live, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, mask=live, other=0.0).to(tl.float32)
        dtotal = tl.load(dtotal_ptr + at, mask=live, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        normed = x * scale
        part += dout * normed
        slope = dout * weight[None, :]
        along = tl.sum(slope * normed, 1) / D
        dx = dtotal + scale * (slope - normed * along[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
    tl.store(parts_ptr + tl.program_id(0) * D + columns, tl.sum(part, 0), mask=columns < D)
