"""Norms of rows: their cases for `test_norm_kernels`, and kernels compiled for GPUs and TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import mosaic_tpu, product, reference
from pallas_kernels.rms_norm import triton as backend
from tests.pallas_kernels.test_triton import build, compiled, spilled
from tests.pallas_kernels.tpu_topology import CHIPS, compile_for, kernels, needs_libtpu

CASES = {  # shape of x, dtype, whether something is added, whether one is added to the weight
    "rows that fill tiles": ((2, 8, 64), "float32", False, False),
    "edges": ((3, 7, 50), "float32", True, True),
    "rounded": ((9, 48), "float16", True, False),
    "one row": ((1, 130), "float32", False, True),
}
MISTAKES = {  # a case that shows it, and what is replaced in the source by what
    "mean of the tile's width": ("edges", "tl.sum(x * x, 1) / D", "tl.sum(x * x, 1) / WIDE"),
    "one left out": ("edges", "weight + 1.0 if PLUS_ONE else weight", "weight"),
    "what came back of the sum left out": ("edges", "dx = dtotal + scale", "dx = scale"),
    "the norm's own slope left out": ("edges", "normed * along[:, None]", "0.0 * along[:, None]"),
    "no epsilon": ("edges", "/ D + EPS)[:, None]", "/ D)[:, None]"),
    "the last rows left out": ("edges", "tl.cdiv(M, ROWS), PROGRAMS", "M // ROWS, PROGRAMS"),
}  # fmt: skip
EPS = 1e-3  # large enough that leaving it out shows
TILE = 128  # numbers of a tile that the interpreter takes


def results(name: str, implementation: str | None) -> dict[str, np.ndarray]:
    """Sum, norm and gradients of a case."""
    shape, dtype, added, plus_one = CASES[name]
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    x, residual, dtotal, dout = (make(*shape) for _ in range(4))
    weight = jnp.asarray(rng.normal(size=shape[-1]), jnp.float32)
    options = {"eps": EPS, "plus_one": plus_one, "implementation": implementation}
    if added:
        run = functools.partial(product.add_rms_norm, **options)
        out, pull = jax.vjp(run, x, residual, weight)
        return _named(*out, *pull((dtotal, dout)))
    out, pull = jax.vjp(functools.partial(product.rms_norm, **options), x, weight)
    return _named(out, *pull(dout))


def _named(*arrays) -> dict[str, np.ndarray]:
    return {str(i): np.asarray(x) for i, x in enumerate(arrays)}


def test_the_reference_is_the_mathematics():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(3, 50)), rng.normal(size=50)
    for plus_one in (False, True):
        want = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * (weight + plus_one)
        given = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)
        got = product.rms_norm(*given, eps=EPS, plus_one=plus_one)
        np.testing.assert_allclose(got, want, atol=1e-5)


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("D", [1024, 2048, 5120, backend.LONGEST])
def test_it_compiles(tmp_path, monkeypatch, capability, D):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pallas_kernels.rms_norm import triton_source

    kinds = {"M": "i32", "parts_ptr": "*fp32"}
    sizes = backend._sizes(D, backend.Config())
    warps = sizes.pop("num_warps")
    for kernel in (triton_source.forward, triton_source.backward):
        built = build(
            kernel, capability, warps, 1, kinds, D=D, EPS=1e-6, PLUS_ONE=False, ADDED=True,
            PROGRAMS=528, STAGES=1, **sizes,
        )  # fmt: skip
        assert spilled(built, tmp_path) == 0, kernel.__name__
        assert "ld.global.v4" in built.asm["ptx"], "16 bytes at a time"


def slopes(x, residual, weight, **options):
    def loss(x, residual, weight):
        total, out = product.add_rms_norm(x, residual, weight, eps=EPS, **options)
        return jnp.sum(total.astype(jnp.float32)) + jnp.sum(out.astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))(x, residual, weight)


LOWERED = [
    (
        *[jax.ShapeDtypeStruct((2, 100, 1024), jnp.bfloat16)] * 2,
        jax.ShapeDtypeStruct((1024,), jnp.bfloat16),
    )
]


def mapped():
    """Arrays of `slopes`, and the axes they are mapped along."""
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.normal(size=(3, 4, 16)), jnp.float32) for _ in range(2)]
    return [((*rows, jnp.ones(16)), (0, 0, None)), ((*rows, jnp.ones((3, 16)) * 2), (0, 0, 0))]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [(8 * 4096, 1024), (1000, 5120), (24, mosaic_tpu.LONGEST)])
def test_it_compiles_for_the_chip(chip, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    weight = jax.ShapeDtypeStruct(shape[-1:], jnp.bfloat16)
    options = {"eps": EPS, "plus_one": False}

    def both(x, residual, weight):
        total, out = mosaic_tpu.forward(x, residual, weight, **options)
        return out, mosaic_tpu.backward(total, x, out, weight, **options)

    assert kernels(compile_for(chip, both, x, x, weight)) == 2


def test_refusals(monkeypatch):
    supported = product.supported
    assert "no implementation" in (supported("cuda", 64, jnp.bfloat16) or "")
    assert "cpu" in (supported("triton", 64, jnp.bfloat16, platform="cpu") or "")
    assert "TPU" in (supported("mosaic_tpu", 64, jnp.bfloat16, platform="cpu") or "")
    assert "float64" in (supported("triton", 64, "float64", platform="gpu") or "")
    monkeypatch.setattr(backend._triton_compat, "refusal", lambda _: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "8192" in (supported("triton", 2**14, jnp.bfloat16, platform="gpu") or "")
    assert supported("triton", 4096, jnp.bfloat16, platform="gpu") is None
    assert supported("xla", 4096, "float64") is None


def test_errors():
    x, weight = jnp.zeros((2, 8)), jnp.zeros(8)
    with pytest.raises(ValueError, match=r"x\(2, 8\), weight\(4,\); want"):
        product.rms_norm(x, weight[:4], eps=EPS)
    with pytest.raises(ValueError, match=r"residual\(8,\) of float32; want both alike"):
        product.add_rms_norm(x, x[0], weight, eps=EPS)
    with pytest.raises(ValueError, match=r"implementation='triton': .*cpu"):
        product.rms_norm(x, weight, eps=EPS, implementation="triton")


def test_a_weight_for_each_head():
    x, weight = jnp.ones((2, 3, 8)), jnp.arange(24.0).reshape(3, 8)
    np.testing.assert_allclose(product.rms_norm(x, weight, eps=0.0)[0], weight)
    assert reference.rms_norm(x, weight, eps=0.0).shape == x.shape
