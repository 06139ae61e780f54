"""Attention over pages by Triton: interpreted on a CPU, compiled for three GPUs, lowered from JAX.

Run as a program, this file is the interpreter's process: TRITON_INTERPRET is read when triton is
imported.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _triton_compat, paged_attention
from pallas_kernels.paged_attention import triton as backend
from tests.pallas_kernels import triton_process
from tests.pallas_kernels.paged_cases import CASES, QUANTISED, SINKS, Batch, in_other_company
from tests.pallas_kernels.test_triton import (
    GENERATIONS,
    build,
    compiled,
    interpreted,
    on_cuda,
    spilled,
)

__all__ = ["on_cuda"]  # a fixture

# Python 3.13 finds fault with how triton builds syntax trees.
pytestmark = pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")

# Mistakes planted in the source, and a case that shows each.
MISTAKES = {
    "stale page": ("mixed", "row * M + key // PAGE", "row * M + begin // PAGE + 0 * key"),
    "mask off by one": ("mixed", "<= position[:, None])", "<= position[:, None] + 1)"),
    "window off by one": ("window", "key[None, :] > position", "key[None, :] >= position"),
    "no rescaling": ("mixed", "acc * shrink[:, None] + added", "acc + added"),
    "merge without rescaling": ("decode", "acc * shrink + part", "acc + part"),
    "wrong key head": ("mixed", "head * G + member % G", "member % G * K + head"),
    "a scale left out": ("int8, mixed", "weights *= tl.load(v_scale", "0 * tl.load(v_scale"),
    "pages that nobody owns": ("mixed", "live = key < high", "live = key < high + BLOCK_KV"),
}  # fmt: skip


def batch_of(name: str) -> Batch:
    return Batch(**{**CASES, **QUANTISED}[name])


COMPANY = {"page": 8, "options": {"window": 19} | SINKS}
COMPANIES = in_other_company(37, **COMPANY)
RIGHT = {
    f"{name}, {invariant=}": {"case": name, "invariant": invariant}
    for name in (*CASES, *QUANTISED)
    for invariant in (False, True)
}
answers = triton_process.answers(__name__, RIGHT)
others = triton_process.answers(
    __name__,
    {name: {"case": of, "replace": pair} for name, (of, *pair) in MISTAKES.items()}
    | {f"company {i}": {"company": i, "invariant": True} for i in range(len(COMPANIES))},
)


@interpreted
def test_interpreted_it_is_the_mathematics(answers):
    for name, job in RIGHT.items():
        wanted = batch_of(job["case"]).wanted()
        np.testing.assert_allclose(answers[name]["out"], wanted, atol=2e-5, err_msg=name)


@interpreted
def test_a_mistake_shows(others):
    for mistake, (name, *_) in MISTAKES.items():
        wanted = batch_of(name).wanted()
        assert not np.allclose(others[mistake]["out"], wanted, atol=1e-3), mistake


@interpreted
def test_bits_depend_on_the_row_alone(others):
    known = {}
    for i, (_, at, position, n) in enumerate(COMPANIES):
        found = others[f"company {i}"]["out"]
        for i in range(n):
            bits = found[at + i].tobytes()
            assert known.setdefault(position + i, bits) == bits, position + i
    assert len(known) == 37


KINDS = {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "sinks_ptr": "*fp32", "lse_ptr": "*fp32",
         "parts_ptr": "*fp32", "table_ptr": "*i32", "starts_ptr": "*i32", "lengths_ptr": "*i32",
         "T": "i32", "B": "i32", "M": "i32"}  # fmt: skip
PLAIN = {"WINDOW": None, "SOFT_CAP": None, "QUANTISED": False, "SINKS": False}
EVERYTHING = {"WINDOW": 500, "SOFT_CAP": 30.0, "QUANTISED": True, "SINKS": True}


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(
    ("H", "pages", "options"),
    [
        (64, "*bf16", PLAIN),
        (128, "*i8", EVERYTHING),
        (128, "*fp8e4nv", EVERYTHING),
        (256, "*bf16", EVERYTHING | {"QUANTISED": False}),
    ],
)
def test_it_compiles(tmp_path, monkeypatch, capability, H, pages, options):
    if pages == "*fp8e4nv" and capability < 89:
        pytest.skip("refused")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pallas_kernels.paged_attention import triton_source

    kinds = KINDS | {"k_ptr": pages, "v_ptr": pages}
    fixed = {"N": 8, "K": 2, "H": H, "PAGE": 16, "SCALE": 0.1, "SPLIT": 512, "PRECISION": "tf32"}
    for decode in (True, False):
        config = backend.DECODE if decode else backend.CHUNKS
        rows, keys = backend._tiles(4, 2 * H, decode, config)
        splits = {"out_ptr": "*fp32"} if decode else {}
        built = build(
            triton_source.attend, capability, config.warps, config.stages, kinds | splits,
            SPLITS=8 if decode else 1,
            BLOCK_M=rows, BLOCK_KV=keys, **fixed, **options,
        )  # fmt: skip
        assert built.metadata.shared <= dict(GENERATIONS.values())[capability]
        spills = spilled(built, tmp_path)
        shared = built.metadata.shared
        print(f"{capability / 10}, H={H}, {pages}, {decode=}: spills {spills}, shared {shared}")
        assert spills <= 512
    merge = build(triton_source.merge, capability, 1, 1, kinds, **fixed, **options)
    assert spilled(merge, tmp_path) == 0


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("pages", ["bfloat16", "int8", "float8_e4m3fn"])
def test_it_lowers(on_cuda, pages, decode):
    def run(q, k, v, scales, table, starts, lengths, sinks):
        return backend.paged_attention(
            q, k, v, table, starts, lengths, scale=0.1, window=100, soft_cap=30.0, sinks=sinks,
            k_scale=scales, v_scale=scales,
        )  # fmt: skip

    shape, whole = jax.ShapeDtypeStruct, jnp.int32
    pages_shape = shape((50, 3, 16, 64), pages)
    scales = None if pages == "bfloat16" else shape((50, 3, 16), jnp.float32)
    text = on_cuda(
        run, 90, shape((8 if decode else 100, 9, 64), jnp.bfloat16), pages_shape, pages_shape,
        scales, shape((8, 64), whole), shape((9,), whole), shape((8,), whole),
        shape((9,), jnp.float32),
    )  # fmt: skip
    assert text.count("custom_call @triton_kernel_call") == (2 if decode else 1)


def test_refusals(monkeypatch):
    facts = {"platform": "gpu", "dtype": jnp.bfloat16, "pages_dtype": jnp.int8, "H": 64}
    assert "cpu" in (backend.refusal(**{**facts, "platform": "cpu"}) or "")
    assert "float64" in (backend.refusal(**{**facts, "dtype": "float64"}) or "")
    assert "pages of bfloat16" in (backend.refusal(**{**facts, "pages_dtype": "float32"}) or "")
    assert "96" in (backend.refusal(**{**facts, "H": 96}) or "")
    assert "scale above" in (backend.refusal(**facts, scale=0.0) or "")
    assert "soft cap" in (backend.refusal(**facts, soft_cap=-1.0) or "")
    assert backend.refusal(**facts) == _triton_compat.missing()
    monkeypatch.setattr(_triton_compat, "missing", lambda: None)
    monkeypatch.setattr(_triton_compat, "capability", lambda: 75)
    assert "7.5" in (backend.refusal(**facts) or "")
    monkeypatch.setattr(_triton_compat, "capability", lambda: 80)
    assert "8.9" in (backend.refusal(**{**facts, "pages_dtype": "float8_e4m3fn"}) or "")
    assert backend.refusal(**facts) is None


def test_an_error_names_what_does_not_fit():
    pytest.importorskip("triton")
    batch = Batch([(1, 3)], H=24)
    arrays, options = batch.arguments()
    with pytest.raises(ValueError, match="head width of 16, 32, 64, 128, 256, not 24"):
        backend.paged_attention(*arrays, **options)


if __name__ == "__main__":
    import torch
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *_):
        """Sums in one order for every row of a tile, as tensor cores do and BLAS does not."""
        products = np.einsum("ik,kj->ij", a.data.astype(np.float32), b.data.astype(np.float32))
        return interpreter.TensorHandle(products + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot

    def tensor_of(x):
        if isinstance(x, int):
            return x
        x = np.array(x)
        if x.dtype.name == "float8_e4m3fn":
            return torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn)
        return torch.from_numpy(x)

    def call(kernel, inputs, outputs, *, programs, num_warps, num_stages, **constants):
        """What `_triton_compat.call` does, by the interpreter, on concrete arrays."""
        kinds = [getattr(torch, out.dtype.name) for out in outputs]
        made = [torch.full(o.shape, np.nan, dtype=k) for o, k in zip(outputs, kinds, strict=True)]
        kernel[(programs,)](*map(tensor_of, inputs), *made, **constants)
        return [jnp.asarray(out.numpy()) for out in made]

    task = triton_process.mend()
    _triton_compat.call = call
    backend._tiles = lambda *_: (16, 8)
    small = backend.Config(split=8)

    def run(job: dict) -> dict[str, np.ndarray]:
        batch = COMPANIES[job["company"]][0] if "company" in job else batch_of(job["case"])
        arrays, options = batch.arguments()
        invariant = job.get("invariant", False)
        out = backend.paged_attention(*arrays, **options, invariant=invariant, config=small)
        return {"out": np.asarray(out)}

    triton_process.answer(paged_attention, task, run)
