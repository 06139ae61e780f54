"""Norms and rotation of heads: cases for `test_norm_kernels`, and kernels compiled for chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.norm_rope import mosaic_tpu, product
from pallas_kernels.norm_rope import triton as backend
from tests.pallas_kernels.test_triton import build, compiled, spilled
from tests.pallas_kernels.tpu_topology import CHIPS, compile_for, kernels, needs_libtpu

CASES = {  # B, T, N, K, H, dtype, whether heads are normed, whether one is added to the weights
    "tiles that are filled": (2, 8, 4, 2, 16, "float32", True, False),
    "edges": (3, 5, 3, 1, 12, "float32", True, True),
    "rotation alone": (1, 7, 4, 2, 16, "float32", False, False),
    "rounded": (2, 5, 2, 2, 16, "float16", True, False),
}
MISTAKES = {  # a case that shows it, and what is replaced in the source by what
    "turned the other way": ("rotation alone", "low * cos - high * sin", "low * cos + high * sin"),
    "pairs of neighbours": ("rotation alone", "at + H // 2, mask=l", "at + 1, mask=l"),
    "the queries' weight for keys": ("edges", "k_norm_ptr, H, HALF, PLUS_ONE)\n    q_low_part",
                                     "q_norm_ptr, H, HALF, PLUS_ONE)\n    q_low_part"),
    "gradient not turned back": ("edges", "low_out * cos + high_out * sin", "low_out * cos"),
    "the norm's own slope left out": ("edges", "high_slope - high * along", "high_slope"),
    "half a head's mean": ("edges", "(high * high, 2)) / H", "(high * high, 2)) * 2 / H"),
    "the last positions left out": ("edges", "tl.cdiv(M, TOKENS), PROG", "M // TOKENS, PROG"),
}  # fmt: skip
EPS = 1e-2
TILE = 256  # numbers of a tile that the interpreter takes


def arrays(name: str) -> tuple:
    """q, k, angles, norms and cotangents of a case."""
    B, T, N, K, H, dtype, normed, _ = CASES[name]
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    q, k, dq, dk = (make(B, T, heads, H) for heads in (N, K, N, K))
    angles = jnp.asarray(rng.uniform(0, 6, size=(B, T, 1, H // 2)), jnp.float32)
    norms = [jnp.asarray(rng.normal(size=H), jnp.float32) for _ in range(2)] if normed else []
    return q, k, jnp.cos(angles), jnp.sin(angles), norms, (dq, dk)


def results(name: str, implementation: str | None) -> dict[str, np.ndarray]:
    """q and k of a case and the gradients of all that has one."""
    q, k, cos, sin, norms, slopes = arrays(name)
    options = {"eps": EPS, "plus_one": CASES[name][-1], "implementation": implementation}

    def run(q, k, *norms):
        return product.norm_rope(q, k, cos, sin, *norms, **options)

    out, pull = jax.vjp(run, q, k, *norms)
    return {str(i): np.asarray(x) for i, x in enumerate((*out, *pull(slopes)))}


@pytest.mark.parametrize("name", ["edges", "rotation alone"])
def test_the_reference_is_the_mathematics(name):
    q, k, cos, sin, norms, _ = arrays(name)
    plus_one = CASES[name][-1]
    got = product.norm_rope(q, k, cos, sin, *norms, eps=EPS, plus_one=plus_one)
    for x, found, weight in zip((q, k), got, norms or (None, None), strict=True):
        x = np.asarray(x, np.float64)
        if weight is not None:
            x /= np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
            x *= np.asarray(weight, np.float64) + plus_one
        pairs = x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]
        pairs *= np.asarray(cos) + 1j * np.asarray(sin)
        want = np.concatenate([pairs.real, pairs.imag], axis=-1)
        np.testing.assert_allclose(found, want, atol=1e-5)


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("N", "K", "H"), [(16, 8, 128), (9, 3, 64), (8, 4, 256), (32, 8, 96)])
def test_it_compiles(tmp_path, monkeypatch, capability, N, K, H):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pallas_kernels.norm_rope import triton_source

    exact = ("cos_ptr", "sin_ptr", "q_parts_ptr", "k_parts_ptr")
    kinds = {"M": "i32", **dict.fromkeys(exact, "*fp32")}
    sizes = backend._sizes(N, K, H, backend.Config())
    warps = sizes.pop("num_warps")
    for kernel in (triton_source.forward, triton_source.backward):
        built = build(
            kernel, capability, warps, 1, kinds, EPS=1e-6, PLUS_ONE=False, NORMED=True,
            PROGRAMS=528, **sizes,
        )  # fmt: skip
        assert spilled(built, tmp_path) == 0, kernel.__name__
        assert "ld.global.v4" in built.asm["ptx"], "16 bytes at a time"


def slopes(q, k, cos, sin, norms, **options):
    def loss(q, k, norms):
        out = product.norm_rope(q, k, cos, sin, *(norms or (None, None)), eps=EPS, **options)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in out)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, norms)


def lowered(normed: bool) -> tuple:
    shape = jax.ShapeDtypeStruct
    q, k = (shape((2, 100, heads, 128), jnp.bfloat16) for heads in (16, 8))
    angles, norm = shape((1, 100, 1, 64), jnp.float32), shape((128,), jnp.bfloat16)
    return q, k, angles, angles, (norm, norm) if normed else None


LOWERED = [lowered(True), lowered(False)]


def mapped():
    """Arrays of `slopes`, and the axes they are mapped along."""
    found = []
    for name in ("edges", "rotation alone"):
        q, k, cos, sin, norms, _ = arrays(name)
        q, k, sin = (jnp.stack([x, 2 * x]) for x in (q, k, sin))
        found.append(((q, k, cos, sin, norms), (0, 0, None, 0, None)))
    return found


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("M", "N", "K", "H"), [(8 * 4096, 16, 8, 128), (1000, 8, 1, 256)])
def test_it_compiles_for_the_chip(chip, M, N, K, H):
    shape = jax.ShapeDtypeStruct
    q, k = (shape((M, heads, H), jnp.bfloat16) for heads in (N, K))
    angles, norm = shape((M, H // 2), jnp.float32), shape((H,), jnp.bfloat16)

    def both(q, k, cos, sin, norms):
        options = {"eps": EPS, "plus_one": True}
        q_out, k_out = mosaic_tpu.forward(q, k, cos, sin, norms, **options)
        slopes = mosaic_tpu.backward(q, k, q_out, k_out, cos, sin, norms, **options)
        return q_out, k_out, slopes

    assert kernels(compile_for(chip, both, q, k, angles, angles, (norm, norm))) == 2


def test_refusals(monkeypatch):
    supported = functools.partial(product.supported, N=16, K=8, dtype=jnp.bfloat16)
    assert "no implementation" in (supported("cuda", H=64) or "")
    assert "cpu" in (supported("triton", H=64, platform="cpu") or "")
    assert "128, not 64" in (supported("mosaic_tpu", H=64, platform="tpu") or "")
    assert "float64" in (supported("triton", H=64, dtype="float64", platform="gpu") or "")
    assert "partition" in (supported("mosaic_tpu", H=128, platform="tpu") or "")
    monkeypatch.setattr(backend._triton_compat, "refusal", lambda _: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "16384" in (supported("triton", N=256, H=128, platform="gpu") or "")
    assert supported("triton", H=128, platform="gpu") is None
    assert supported("xla", H=3, dtype="float64") is None


def test_errors():
    shapes = ((2, 3, 4, 8), (2, 3, 2, 8), (1, 3, 1, 4), (8,))
    q, k, angle, norm = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=r"q\(2, 3, 4, 8\), k\(3, 2, 8\)"):
        product.norm_rope(q, k[0], angle, angle)
    with pytest.raises(ValueError, match=r"want angles of \(2, 3, 1, 4\)"):
        product.norm_rope(q, k, angle, angle[:, :2])
    with pytest.raises(ValueError, match=r"want \(8,\) twice, or neither"):
        product.norm_rope(q, k, angle, angle, norm)
    with pytest.raises(ValueError, match=r"implementation='triton': .*cpu"):
        product.norm_rope(q, k, angle, angle, implementation="triton")
