"""Few rows times weights of 8 or 4 bits as a Triton kernel: the source alone.

x [M, K] is of a 16-bit float type, values [g, N, n] int8 or [g, N, n / 2] uint8 with two numbers a
byte (the earlier one low, each plus 8), scales [g, N] float32, K = g n; all contiguous. The grid
has one axis, of SPLITS ceil(N / BLOCK_N) programs: one makes what a part of K gives to BLOCK_N
outputs of all rows, BLOCK_K numbers at a time, which lie in one group. With one split `out` is
[M, N] of x's type, else [SPLITS, M, N] float32, to be added up.

Weights are the product's left side and stay in registers, where they become floats; x is its right
side, and M is padded to BLOCK_M, 16 or more. Sums are float32, scaled once a step.

Cost: the weights' bytes, once; x N / BLOCK_N times, from the L2 cache.
"""

# A type checker takes this folder's triton.py for the package; Python does not.
# pyright: reportAttributeAccessIssue=false
import triton
import triton.language as tl


@triton.jit
def weight_matmul(
    x_ptr, values_ptr, scales_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a split."""
    BYTES: tl.constexpr = BLOCK_K * BITS // 8  # of an output's weights in a step
    ROW: tl.constexpr = GROUP * BITS // 8  # of an output's in a group
    STEPS: tl.constexpr = K // BLOCK_K
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    tiles = tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    inside = (outputs < N)[:, None]
    of_values = values_ptr + outputs[:, None] * ROW + tl.arange(0, BYTES)[None, :]
    of_x = x_ptr + rows[:, None] * K + tl.arange(0, BLOCK_K)[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(split * EACH, tl.minimum(split * EACH + EACH, STEPS)):
        first = step * BLOCK_K
        group = first // GROUP
        at = tl.cast(group, tl.int64) * (N * ROW) + (first - group * GROUP) * BITS // 8
        values = tl.load(of_values + at, mask=inside, other=0)
        x = tl.load(of_x + first, mask=(rows < M)[:, None], other=0.0)
        scale = tl.load(scales_ptr + group * N + outputs, mask=outputs < N, other=0.0)
        if BITS == 8:
            part = tl.dot(values.to(x.dtype), tl.trans(x))
        else:
            even, odd = tl.split(tl.reshape(x, (BLOCK_M, BYTES, 2)))
            low = ((values & 15).to(tl.int8) - 8).to(x.dtype)
            high = ((values >> 4).to(tl.int8) - 8).to(x.dtype)
            part = tl.dot(low, tl.trans(even))
            part = tl.dot(high, tl.trans(odd), part)
        acc += part * scale[:, None]

    out = out_ptr + split * (M * N) + rows[None, :] * N + outputs[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside & (rows < M)[None, :])
