"""Sectors, banks and swizzles by arithmetic; CUDA C on the CPU with its accesses counted."""

import numpy as np
import pytest

from contrast import cuda_on_cpu, warp_memory
from contrast.cuda_on_cpu import Traffic, run
from jaxinfra.errors import UserError

compiled = pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason="needs a C++ compiler")


def test_sectors_are_of_32_bytes():
    assert warp_memory.sectors([0, 4, 28]) == 1
    assert warp_memory.sectors([0, 32]) == 2
    assert warp_memory.sectors([28], size=8) == 2  # across an edge
    assert warp_memory.least_sectors([0, 32, 64, 96]) == 1
    assert warp_memory.sectors([16 * i for i in range(32)], 16) == 16


def test_passes_are_of_the_fullest_bank():
    lane = range(32)
    assert warp_memory.passes([4 * i for i in lane]) == 1
    assert warp_memory.passes([0] * 32) == 1  # one word for all
    assert warp_memory.passes([128 * i for i in lane]) == 32
    assert warp_memory.passes([132 * i for i in lane]) == 1
    assert warp_memory.passes([8 * i for i in lane]) == 2
    assert warp_memory.passes([16 * i for i in lane], 16) == 4  # a quarter of the warp a pass


def test_a_swizzle_moves_every_byte_and_spreads_columns():
    places = [warp_memory.swizzled(row, byte) for row in range(16) for byte in range(128)]
    assert sorted(places) == list(range(16 * 128))
    for chunk in range(8):
        column = [(row, 16 * chunk) for row in range(8)]
        assert warp_memory.passes([warp_memory.swizzled(*at) for at in column], 16) == 1
        assert warp_memory.passes([128 * row + byte for row, byte in column], 16) == 8


@compiled
def test_three_transposes_are_right_and_differ_as_counted():
    n = 32
    x = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
    found = {}
    for name in ("naive", "tiled", "padded"):
        out = np.zeros_like(x)
        found[name] = run(cuda_on_cpu.TRANSPOSE, name, (1, 1), (32, 32), x, out, n)
        np.testing.assert_array_equal(out, x.T)
    warps = n * n // 32
    assert found["naive"]["global read"] == Traffic(warps, 4 * warps, 4 * warps)
    assert found["naive"]["global write"] == Traffic(warps, 32 * warps, 4 * warps)
    assert found["tiled"]["global write"] == Traffic(warps, 4 * warps, 4 * warps)
    assert found["tiled"]["shared read"] == Traffic(warps, 32 * warps, warps)
    assert found["padded"]["shared read"] == Traffic(warps, warps, warps)


@compiled
def test_a_wrong_kernel_gives_a_wrong_answer_and_edges_are_kept():
    text = """
__global__ void add(const float* x, float* out, float what, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] + what;
}
"""
    x = np.arange(40, dtype=np.float32)
    out = np.zeros(48, np.float32)
    seen = run(text, "add", (2,), (32,), x, out, 1.5, 40)
    np.testing.assert_array_equal(out[:40], x + 1.5)
    assert (out[40:] == 0).all()
    assert seen["global read"] == Traffic(requests=2, units=5, least=5)
    run(text.replace("i < n", "i < n - 1"), "add", (2,), (32,), x, out := out * 0, 1.5, 40)
    assert out[39] == 0


@compiled
def test_what_a_gpu_would_refuse_is_refused():
    x = np.zeros((4, 4), np.float32)
    with pytest.raises(UserError, match="a block of 2048 threads"):
        run("__global__ void f(float* x) {}", "f", (1,), (2048,), x)
    with pytest.raises(UserError, match="does not compile"):
        run("__global__ void f(float* x) { x[0] = y; }", "f", (1,), (1,), x)
    with pytest.raises(UserError, match="contiguous"):
        run("__global__ void f(float* x) {}", "f", (1,), (1,), x[:, ::2])
