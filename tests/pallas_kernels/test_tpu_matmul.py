"""The TPU's product: in the TPU interpreter against the reference, and compiled for real chips."""

import functools
import itertools

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import mosaic_tpu, reference
from pallas_kernels.matmul.mosaic_tpu import Tiles
from tests.pallas_kernels.tpu_topology import CHIPS, compile_for, info, kernels, needs_libtpu

SMALL = Tiles(128, 128, 128)
SHAPES = {  # M, N, K
    "whole tiles": (128, 256, 256),
    "edges everywhere": (200, 300, 330),
    "less than a tile": (13, 140, 70),
    "one row": (1, 256, 129),
    "one product": (3, 5, 1),
}


def inputs(M, N, K, dtype):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return make(M, K), make(K, N)


def interpreted(a, b, tiles=SMALL):
    params = pltpu.InterpretParams(uninitialized_memory="nan", random_seed=1)
    return jax.block_until_ready(mosaic_tpu.matmul(a, b, tiles=tiles, interpret=params))


def right(found, a, b):
    """Whether `found` is as near to the exact product as the reference is."""
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    error, allowed = (
        np.abs(np.asarray(x, np.float64) - exact).max() for x in (found, reference.matmul(a, b))
    )
    return error <= 1.01 * allowed + 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, jnp.bfloat16) for shape in SHAPES), ("edges everywhere", jnp.float32)],
)
def test_it_is_the_product(shape, dtype):
    a, b = inputs(*SHAPES[shape], dtype)
    found = interpreted(a, b)
    assert found.dtype == dtype and right(found, a, b)


def test_the_check_rejects_an_edge_that_is_not_masked(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_existing", lambda block, axis, size: block)
    a, b = inputs(64, 128, 130, jnp.bfloat16)
    assert not right(interpreted(a, b), a, b)


def test_the_check_rejects_steps_along_k_in_any_order(monkeypatch):
    def unordered(dimension_semantics, **options):
        return real(dimension_semantics=("parallel",) * len(dimension_semantics), **options)

    real = pltpu.CompilerParams
    monkeypatch.setattr(pltpu, "CompilerParams", unordered)
    a, b = inputs(64, 128, 128 * 8, jnp.bfloat16)
    assert not right(interpreted(a, b), a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", CHIPS)
def test_a_tile_keeps_the_chip_busy_and_fits_its_memory(chip, dtype):
    itemsize, peak = jnp.dtype(dtype).itemsize, info(chip).bf16_ops_per_second
    needed = peak / (6 if itemsize == 4 else 1) / info(chip).mem_bw_bytes_per_second
    for shape in itertools.product((1, 130, 1024, 8192), repeat=3):
        tiles = mosaic_tpu.tiles_for(*shape, dtype, info(chip))
        assert tiles.vmem(itemsize) <= info(chip).vmem_capacity_bytes // 2
        assert not (tiles.m % 128 or tiles.n % 128 or tiles.k % 128)
        if min(shape) == 8192:
            assert tiles.intensity(itemsize) > needed


def test_what_does_not_fit_is_refused():
    a, b = inputs(8, 8, 8, jnp.float32)
    assert "TPU" in mosaic_tpu.refusal(platform="cpu", dtype=jnp.bfloat16)
    assert "float16" in mosaic_tpu.refusal(platform="tpu", dtype=jnp.float16)
    assert mosaic_tpu.refusal(platform="tpu", dtype=jnp.bfloat16) is None
    with pytest.raises(ValueError, match=r"a\(8, 8\) and b\(7, 8\)"):
        mosaic_tpu.matmul(a, b[:7])
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        mosaic_tpu.matmul(a, b.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="length 0"):
        mosaic_tpu.matmul(a[:0], b)
    with pytest.raises(ValueError, match="not multiples of 128"):
        mosaic_tpu.matmul(a, b, tiles=Tiles(100, 128, 128))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(8192, 8192, 8192), *SHAPES.values()], ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_it_compiles_for_the_chip(chip, shape, dtype):
    M, N, K = shape
    a, b = (jax.ShapeDtypeStruct(x, dtype) for x in ((M, K), (K, N)))
    compiled = compile_for(chip, mosaic_tpu.matmul, a, b)
    assert kernels(compiled) == 1
    assert compiled.cost_analysis()["flops"] == 2 * M * N * K


@needs_libtpu
@pytest.mark.slow
def test_the_compiler_holds_a_tile_to_the_chips_memory():
    a = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    huge = functools.partial(mosaic_tpu.matmul, tiles=Tiles(2048, 2048, 2048))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"Ran out of memory in memory space vmem"):
        compile_for("v5p", huge, a, a)
