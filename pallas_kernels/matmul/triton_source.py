"""The product of two matrices as a Triton kernel: the source alone, for JAX and for PyTorch.

a [M, K], b [K, N] and out [M, N] are contiguous, of one 16-bit float type; sums are float32. The
grid has one axis, of ceil(M / BLOCK_M) ceil(N / BLOCK_N) programs, one a tile of out. GROUP rows of
tiles are walked together, column by column, so that the tiles at work share rows of a and columns
of b in the L2 cache. M, N and K are compiled in: edges are masked only where there are any.

Cost: 2 M N K FLOPs; M N K (1 / BLOCK_M + 1 / BLOCK_N) numbers read from the L2 cache.
"""

# A type checker takes this folder's triton.py for the package; Python does not.
# pyright: reportAttributeAccessIssue=false
import triton
import triton.language as tl


@triton.jit
def _load(pointers, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, EDGES: tl.constexpr):
    """A tile of a matrix of ROWS x COLS; zeros past its edges."""
    if EDGES:
        return tl.load(pointers, mask=(rows < ROWS)[:, None] & (cols < COLS)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def matmul(
    a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    within = program - first * tiles_n
    height = tl.minimum(GROUP, tiles_m - first)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)

    a = a_ptr + tl.cast(rows, tl.int64)[:, None] * K + ks[None, :]
    b = b_ptr + ks[:, None] * N + cols[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):
        a_tile = _load(a, rows, start + ks, M, K, M % BLOCK_M != 0)
        b_tile = _load(b, start + ks, cols, K, N, N % BLOCK_N != 0)
        acc = tl.dot(a_tile, b_tile, acc)
        a += BLOCK_K
        b += BLOCK_K * N
    if K % BLOCK_K != 0:
        ks += K // BLOCK_K * BLOCK_K
        acc = tl.dot(_load(a, rows, ks, M, K, True), _load(b, ks, cols, K, N, True), acc)

    out = out_ptr + tl.cast(rows, tl.int64)[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
