"""Norms of rows: kernels interpreted against the specification, and compiled for GPUs and TPUs.

Run as a program, this file is the interpreter's process: TRITON_INTERPRET is read when triton is
imported.
"""

import dataclasses
import functools
import importlib
import re
from pathlib import Path

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rms_norm import mosaic_tpu, product, reference
from pallas_kernels.rms_norm import triton as backend
from tests.pallas_kernels import triton_process
from tests.pallas_kernels.test_triton import build, compiled, interpreted, on_cuda, spilled
from tests.pallas_kernels.tpu_topology import CHIPS, compile_for, kernels, needs_libtpu

__all__ = ["on_cuda"]  # a fixture

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


def near(got: dict[str, np.ndarray], want: dict[str, np.ndarray], dtype: str) -> bool:
    allowed = 2e-5 if dtype == "float32" else 4e-3
    return got.keys() == want.keys() and all(
        got[k].dtype == want[k].dtype and np.allclose(got[k], want[k], atol=allowed, rtol=allowed)
        for k in want
    )


def test_the_reference_is_the_mathematics():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(3, 50)), rng.normal(size=50)
    for plus_one in (False, True):
        want = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * (weight + plus_one)
        given = jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32)
        got = product.rms_norm(*given, eps=EPS, plus_one=plus_one)
        np.testing.assert_allclose(got, want, atol=1e-5)


@interpreted
def test_interpreted_it_is_the_specification(tmp_path):
    jobs = [{"case": name} for name in CASES]
    for name, found in zip(CASES, in_interpreter(tmp_path, jobs), strict=True):
        assert near(found, results(name, None), CASES[name][1]), name


@interpreted
def test_a_mistake_shows(tmp_path):
    jobs = [{"case": name, "replace": pair} for name, *pair in MISTAKES.values()]
    for mistake, job, found in zip(MISTAKES, jobs, in_interpreter(tmp_path, jobs), strict=True):
        assert not near(found, results(job["case"], None), CASES[job["case"]][1]), mistake


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


def test_it_lowers(on_cuda, monkeypatch):
    monkeypatch.setattr(backend, "refusal", lambda **_: None)
    x = jax.ShapeDtypeStruct((2, 100, 1024), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((1024,), jnp.bfloat16)
    run = functools.partial(slopes, implementation="triton")
    text = on_cuda(run, 90, x, x, weight)
    assert len(re.findall(r"custom_call @triton_kernel_call", text)) == 2


@pytest.fixture
def tpu(monkeypatch):
    """The TPU's kernels are interpreted, by blocks of 16 rows or so."""
    params = pltpu.InterpretParams(uninitialized_memory="nan")
    monkeypatch.setattr(mosaic_tpu, "refusal", lambda **_: None)
    for name in ("forward", "backward"):
        run = functools.partial(getattr(mosaic_tpu, name), block=1, interpret=params)
        monkeypatch.setattr(mosaic_tpu, name, run)
    for cached in (product._run, product._run_back):
        monkeypatch.setattr(product, cached.__name__, cached.__wrapped__)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "edges" else pytest.mark.slow) for n in sorted(CASES)]
)
@pytest.mark.usefixtures("tpu")
def test_the_tpus_kernels_are_the_specification(name):
    assert near(results(name, "mosaic_tpu"), results(name, None), CASES[name][1])


@pytest.mark.usefixtures("tpu")
def test_rows_behind_the_last_would_show(monkeypatch):
    monkeypatch.setattr(jnp, "where", lambda _, yes, no: yes)
    assert not near(results("edges", "mosaic_tpu"), results("edges", None), "float32")


@pytest.mark.usefixtures("tpu")
def test_mapped_plain_mathematics_takes_the_kernels_place():
    rng = np.random.default_rng(0)
    x, residual = (jnp.asarray(rng.normal(size=(3, 4, 16)), jnp.float32) for _ in range(2))
    for weight, axis in ((jnp.ones(16), None), (jnp.ones((3, 16)) * 2, 0)):
        mapped = jax.vmap(functools.partial(slopes, implementation="mosaic_tpu"), (0, 0, axis))
        want = jax.vmap(slopes, (0, 0, axis))(x, residual, weight)
        for got, wanted in zip(mapped(x, residual, weight), want, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


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


def in_interpreter(folder: Path, jobs: list[dict]) -> list[dict[str, np.ndarray]]:
    """The results of each job."""
    return triton_process.each("tests.pallas_kernels.test_rms_norm", folder, jobs)


if __name__ == "__main__":
    task = triton_process.mend()
    triton_process.stand_in(backend._triton_compat)
    backend.refusal = lambda **_: None
    product.unmapped = lambda kernel, plain: kernel
    small = dataclasses.replace(backend.Config(), tile=128)
    for part in ("forward", "backward"):
        setattr(backend, part, functools.partial(getattr(backend, part), config=small))
    backend._compat.multiprocessors = lambda _: 1
    family = importlib.import_module("pallas_kernels.rms_norm")  # the name there is a function's
    triton_process.answer(family, task, lambda job: results(job["case"], "triton"))
