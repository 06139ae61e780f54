"""Quantised products: formats, the specification against float64, XLA's against it, Hopper's."""

import functools
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.interpreter import WHOLE, RaceError, interpret
from pallas_kernels.matmul.mosaic_gpu import SHARED_MEMORY
from pallas_kernels.quantised_matmul import (
    formats,
    fp8_blocks,
    fp8_matmul,
    fp8_rows,
    fp8_tensor,
    integers,
    mosaic_gpu,
    product,
    reference,
    supported,
    triton,
    weight_matmul,
    xla,
)
from pallas_kernels.quantised_matmul.mosaic_gpu import Config

newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")
KINDS = {"tensor": (fp8_tensor, fp8_tensor), "blocks": (fp8_rows, fp8_blocks)}


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def fp8_case(kind, M, N, K):
    """a, b and their scales, of numbers whose blocks differ in size."""
    x, w = draw(M, K), draw(N, K, seed=1)
    if kind == "blocks":
        x = x * jnp.exp2(jnp.arange(K) // 128)
        w = w * jnp.exp2(jnp.arange(N)[:, None] // 128)
    (a, a_scale), (b, b_scale) = (of(m) for of, m in zip(KINDS[kind], (x, w), strict=True))
    return a, b, a_scale, b_scale


def exact(a, b, a_scale, b_scale):
    """The product in float64, one scale at a time."""
    a, b, a_scale, b_scale = (np.asarray(x, np.float64) for x in (a, b, a_scale, b_scale))
    if not a_scale.ndim:
        return a @ b.T * (a_scale * b_scale)
    out = np.zeros((len(a), len(b)))
    for k in range(a_scale.shape[1]):
        ks = slice(128 * k, 128 * (k + 1))
        for n in range(b_scale.shape[0]):
            ns = slice(128 * n, 128 * (n + 1))
            out[:, ns] += a[:, ks] @ b[ns, ks].T * a_scale[:, k, None] * b_scale[n, k]
    return out


def off(found, wanted):
    """The difference in the mean square, as a share."""
    found = np.asarray(found, np.float64)
    return np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_products_of_8_bit_floats(kind):
    operands = fp8_case(kind, 24, 200, 256)
    wanted = exact(*operands)
    assert off(reference.fp8_matmul(*operands, jnp.float32), wanted) < 1e-6
    assert off(fp8_matmul(*operands), wanted) < 4e-3
    assert off(fp8_matmul(*operands, dtype=jnp.float16), wanted) < 1e-3


def test_a_scale_of_the_wrong_block_is_seen():
    a, b, a_scale, b_scale = fp8_case("blocks", 24, 200, 256)
    assert off(fp8_matmul(a, b, a_scale, b_scale[::-1]), exact(a, b, a_scale, b_scale)) > 0.1


@pytest.mark.parametrize("of", [fp8_tensor, fp8_rows, fp8_blocks])
def test_8_bit_floats_are_the_nearest(of):
    """Three bits of mantissa: half a step is a sixteenth; less than the smallest are subnormal."""
    x = draw(130, 256).at[:, :3].set(0)
    values, scale = of(x)
    rows = 128 if of is fp8_blocks else 1
    back = np.asarray(reference.fp8_floats(values, scale, rows), np.float64)
    largest = np.abs(x).max()
    assert np.all(np.abs(back - x) <= np.abs(x) / 16 * 1.001 + largest * 2.0**-18)
    assert np.isfinite(np.asarray(values, np.float32)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 96])
def test_products_with_integer_weights(bits, group):
    w, x = draw(40, 96), draw(5, 96, seed=1, dtype=jnp.bfloat16)
    values, scales = integers(w, bits, group)
    steps = np.asarray(values if bits == 8 else formats.unpack(values), np.float64)
    back = np.swapaxes(steps * np.asarray(scales, np.float64)[..., None], 0, 1).reshape(40, 96)
    whole = np.swapaxes(np.repeat(np.asarray(scales), group, axis=1).reshape(-1, 40, group), 0, 1)
    assert np.all(np.abs(back - w) <= whole.reshape(40, 96) * 0.5001)
    wanted = np.asarray(x, np.float64) @ back.T
    assert off(reference.weight_matmul(x.astype(jnp.float32), values, scales), wanted) < 1e-6
    assert off(weight_matmul(x, values, scales), wanted) < 6e-3
    swapped = ((values >> 4) | (values << 4)) if bits == 4 else values[..., ::-1]
    assert off(weight_matmul(x, swapped, scales), wanted) > 0.1


def test_bytes_hold_the_earlier_number_low():
    packed = formats.pack(jnp.asarray([[[-8, 7, 0, 1]]], jnp.int8))
    assert packed.tolist() == [[[0xF0, 0x98]]]
    assert formats.unpack(packed).tolist() == [[[-8, 7, 0, 1]]]


def test_it_is_the_engines_format():
    from jaxinfra.model.quantized import QuantizedMatrix, dequantize

    values, scales = integers(draw(24, 64), 4, 32)
    matrix = QuantizedMatrix(values, scales, shape=(64, 24))
    np.testing.assert_array_equal(dequantize(matrix), reference.weight_floats(values, scales))


def test_a_product_with_weights_has_a_gradient():
    values, scales = integers(draw(24, 64), 8, 32)
    x = draw(3, 64, seed=1)
    found = jax.grad(lambda x: jnp.sum(weight_matmul(x, values, scales)))(x)
    wanted = jnp.sum(reference.weight_floats(values, scales), axis=0)
    np.testing.assert_allclose(found, jnp.broadcast_to(wanted, x.shape), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_the_kernel_is_chosen_for_few_rows_with_xlas_gradient(monkeypatch, rows):
    calls = []

    def kernel(x, values, scales, *, dtype, tiles):
        calls.append(dtype)
        return 2 * xla.weight_matmul(x, values, scales, dtype=dtype)  # the 2 shows who multiplied

    monkeypatch.setattr(product, "supported", lambda *_, **__: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(triton, "weight_matmul", kernel)
    values, scales = integers(draw(8, 64, seed=1), 8, 32)
    of = functools.partial(weight_matmul, values=values, scales=scales, dtype=jnp.float32)
    plain = functools.partial(of, implementation="xla")
    x, dy = draw(rows, 64, dtype=jnp.bfloat16), draw(rows, 8, seed=2)
    (out, pull), (want, want_pull) = jax.vjp(of, x), jax.vjp(plain, x)
    np.testing.assert_allclose(out, (1 if rows == 1 else 2) * want, rtol=1e-6)
    assert calls == [] if rows == 1 else set(calls) == {jnp.float32}
    slope, wanted = (np.asarray(back(dy)[0], np.float32) for back in (pull, want_pull))
    np.testing.assert_array_equal(slope, wanted)
    several = jnp.stack([x, x])
    np.testing.assert_allclose(jax.vmap(of)(several), jax.vmap(plain)(several), rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_tiles_of_large_matrices_have_fewer_splits(bits):
    few, many = (triton.choose(16, N, bits) for N in (4096, 151_936))
    assert many.splits == 1 and (few.splits or 0) > 1
    assert (few.block_n, few.num_warps) == (many.block_n, many.num_warps)


# The kernel on Hopper: kind of scales, M, N, K, the schedule.
HOPPER = {
    "blocks": ("blocks", 256, 128, 256, Config(slots=2)),
    "blocks in part": ("blocks", 136, 320, 256, Config(192, 2)),
    "blocks, rows in pairs": ("blocks", 300, 130, 256, Config(slots=2, cluster=2)),
    "padded inside": ("tensor", 3, 70, 100, Config(192, 2)),
    "tensor": ("tensor", 256, 128, 256, Config(slots=2)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "blocks" else [pytest.mark.slow, newer])
        for name in sorted(HOPPER)
    ],
)
def test_the_kernel_interpreted(name):
    *case, config = HOPPER[name]
    operands = fp8_case(*case)
    assert off(interpret(fp8_matmul, *operands, config=config), exact(*operands)) < 3e-3


MISTAKES = {
    "products before their operands arrive": ("plgpu.barrier_wait(arrived.at[slot])", "pass"),
    "slots filled while they are read": (
        "plgpu.barrier_wait(free.at[slot])", "pass"
    ),
    "slots handed back before they are read": (
        "plgpu.barrier_wait(arrived.at[slot])",
        "plgpu.barrier_wait(arrived.at[slot]); plgpu.barrier_arrive(free.at[slot])",
    ),
    "a result that leaves before it is seen": (
        "plgpu.commit_smem()", "pass"
    ),
}  # fmt: skip
EARLIEST = "products before their operands arrive"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == EARLIEST else [pytest.mark.slow, newer])
        for name in sorted(MISTAKES)
    ],
)
def test_every_mistake_is_found(monkeypatch, name):
    right, wrong = MISTAKES[name]
    source = Path(mosaic_gpu.__file__).read_text()
    assert source.count(right) == 1, right
    mistaken = types.ModuleType("mistaken")
    monkeypatch.setitem(sys.modules, mistaken.__name__, mistaken)
    exec(source.replace(right, wrong), mistaken.__dict__)
    monkeypatch.setattr(mosaic_gpu, "fp8_matmul", mistaken.fp8_matmul)
    # Where no slot is used twice, whoever does not wait for it cannot hold up the one who fills it.
    inputs = 256 if name == EARLIEST else 384
    operands = fp8_case("tensor", 256, 128, inputs)
    with pytest.raises(RaceError):
        interpret(fp8_matmul, *operands, config=Config(slots=2))


@pytest.mark.slow
def test_a_scale_of_other_rows_is_seen(monkeypatch):
    """What the kernel's check above would say, were a's scales those of the next rows."""
    a, b, a_scale, b_scale = fp8_case("blocks", 256, 128, 256)
    found = interpret(fp8_matmul, a, b, jnp.roll(a_scale, 1, 0), b_scale, config=Config(slots=2))
    assert off(found, exact(a, b, a_scale, b_scale)) > 0.01


def test_the_schedule_follows_the_scales():
    assert mosaic_gpu.choose(4096, blocked=False).tile_n == 192
    assert mosaic_gpu.choose(4096, blocked=True).cluster == 2
    assert mosaic_gpu.choose(64, blocked=True).cluster == 1  # the other block would be idle


@pytest.mark.parametrize(
    "config",
    [mosaic_gpu.choose(4096, blocked=False), mosaic_gpu.choose(4096, blocked=True), Config()],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("blocked", [False, True])
def test_every_schedule_lowers_for_the_chip(blocked, dtype, config):
    M, N, K = 1000, 448, 1024
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    a, b = (jax.ShapeDtypeStruct(s, formats.FP8) for s in ((M, K), (N, K)))
    scales = (shape((8, M)), shape((4, 8))) if blocked else (shape((1,)), None)
    run = jax.jit(functools.partial(mosaic_gpu.fp8_matmul, dtype=dtype, config=config))
    lowered = run.trace(a, b, *scales).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert config.shared_memory <= SHARED_MEMORY - 1024  # barriers need some


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"b": jnp.zeros((8, 9), formats.FP8)}, r"a\(4, 256\), b\(8, 9\)"),
        ({"a": jnp.zeros((4, 256))}, "want float8_e4m3fn"),
        ({"a_scale": jnp.ones((4, 3))}, r"want scalars, or .* \(4, 2\) and \(1, 2\)"),
        ({"dtype": jnp.float32}, "want bfloat16 or float16"),
        ({"implementation": "mosaic_gpu"}, "arrays are on cpu"),
        ({"implementation": "triton"}, "triton"),
    ],
)
def test_what_does_not_fit(monkeypatch, change, says):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    operands = {"a": jnp.zeros((4, 256), formats.FP8), "b": jnp.zeros((8, 256), formats.FP8),
                "a_scale": jnp.ones((4, 2)), "b_scale": jnp.ones((1, 2))}  # fmt: skip
    with pytest.raises(ValueError, match=says):
        fp8_matmul(**(operands | change))


@pytest.mark.parametrize(
    ("x", "values", "scales", "says"),
    [
        ((4, 64), (2, 8, 33), (2, 8), r"x\(4, 64\), values\(2, 8, 33\)"),
        ((4, 64), (2, 8, 32), (2, 9), r"scales\(2, 9\)"),
        ((0, 64), (2, 8, 32), (2, 8), "not empty"),
    ],
)
def test_weights_that_do_not_fit(x, values, scales, says):
    with pytest.raises(ValueError, match=says):
        weight_matmul(jnp.zeros(x), jnp.zeros(values, jnp.int8), jnp.zeros(scales))


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="want floats, int8 or uint8"):
        weight_matmul(jnp.zeros((4, 64)), jnp.zeros((2, 8, 32), jnp.int16), jnp.zeros((2, 8)))
    for bits, group in ((3, 32), (8, 48), (4, 1)):
        with pytest.raises(ValueError, match="want 8 or 4 bits"):
            integers(draw(8, 64), bits, group)


def test_refusals(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    gpu = functools.partial(supported, platform="gpu")
    assert supported("xla", jnp.float32) is None
    assert "there are mosaic_gpu, triton, xla" in (supported("cutlass", formats.FP8) or "")
    assert "are on cpu" in (supported("mosaic_gpu", formats.FP8) or "")
    assert "are on cpu" in (supported("triton", jnp.bfloat16) or "")
    assert gpu("mosaic_gpu", formats.FP8) is None
    assert "not bfloat16" in (gpu("mosaic_gpu", jnp.bfloat16) or "")
    assert "not float32" in (gpu("triton", jnp.float32) or "")
    assert "not 65" in (gpu("triton", jnp.bfloat16, rows=65) or "")
    assert "not 48" in (gpu("triton", jnp.bfloat16, group=48) or "")
    monkeypatch.setattr(triton._triton_compat, "missing", lambda: None)
    assert gpu("triton", jnp.bfloat16, rows=64, group=96) is None


def test_the_choice_is_logged(caplog):
    with caplog.at_level("DEBUG", logger="pallas_kernels.quantised_matmul.product"):
        fp8_matmul(*fp8_case("tensor", 8, 8, 128))
    assert "fp8_matmul: xla" in caplog.text
