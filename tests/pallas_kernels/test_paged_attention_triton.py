"""Attention over pages by Triton: interpreted on a CPU, compiled for three GPUs, lowered from JAX.

Run as a program, this file is the interpreter's process: TRITON_INTERPRET is read when triton is
imported. It takes all its jobs at once.
"""

from pathlib import Path

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
    compiled,
    interpreted,
    on_cuda,
    spilled,
)

__all__ = ["on_cuda"]  # a fixture

# Python 3.13 finds fault with how triton builds syntax trees.
pytestmark = pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")
ROOT = Path(backend.__file__).parents[2]

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


def in_interpreter(folder: Path, *jobs: dict) -> list[np.ndarray]:
    """The outputs of jobs."""
    module = "tests.pallas_kernels.test_paged_attention_triton"
    outputs = triton_process.ask(module, folder, list(jobs))
    return [outputs[str(i)] for i in range(len(jobs))]


def batch_of(name: str) -> Batch:
    return Batch(**{**CASES, **QUANTISED}[name])


@interpreted
def test_interpreted_it_is_the_mathematics(tmp_path):
    names = [*CASES, *QUANTISED]
    jobs = [{"case": name, "invariant": flag} for name in names for flag in (False, True)]
    for job, found in zip(jobs, in_interpreter(tmp_path, *jobs), strict=True):
        np.testing.assert_allclose(
            found, batch_of(job["case"]).wanted(), atol=2e-5, err_msg=str(job)
        )


@interpreted
@pytest.mark.slow
def test_a_mistake_shows(tmp_path):
    jobs = [{"case": name, "replace": replace} for name, *replace in MISTAKES.values()]
    for mistake, job, found in zip(MISTAKES, jobs, in_interpreter(tmp_path, *jobs), strict=True):
        wanted = batch_of(job["case"]).wanted()
        assert not np.allclose(found, wanted, atol=1e-3), mistake


COMPANY = {"page": 8, "options": {"window": 19} | SINKS}


@interpreted
def test_bits_depend_on_the_row_alone(tmp_path):
    batches = in_other_company(37, **COMPANY)
    jobs = [{"company": i, "invariant": True} for i in range(len(batches))]
    known = {}
    for (_, at, position, n), found in zip(batches, in_interpreter(tmp_path, *jobs), strict=True):
        for i in range(n):
            bits = found[at + i].tobytes()
            assert known.setdefault(position + i, bits) == bits, position + i
    assert len(known) == 37


KINDS = {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "sinks_ptr": "*fp32", "lse_ptr": "*fp32",
         "parts_ptr": "*fp32", "table_ptr": "*i32", "starts_ptr": "*i32", "lengths_ptr": "*i32",
         "T": "i32", "B": "i32", "M": "i32"}  # fmt: skip
PLAIN = {"WINDOW": None, "SOFT_CAP": None, "QUANTISED": False, "SINKS": False}
EVERYTHING = {"WINDOW": 500, "SOFT_CAP": 30.0, "QUANTISED": True, "SINKS": True}


def build(kernel, capability: int, pages: str, num_warps: int, num_stages: int, **constants):
    """A kernel compiled by Triton down to machine code for a GPU that need not be here."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = KINDS | {"k_ptr": pages, "v_ptr": pages}
    if constants.get("SPLITS", 1) > 1:
        kinds["out_ptr"] = "*fp32"
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*bf16") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(
    ("H", "pages", "options"),
    [
        (64, "*bf16", PLAIN),
        pytest.param(128, "*i8", EVERYTHING, marks=pytest.mark.slow),
        pytest.param(128, "*fp8e4nv", EVERYTHING, marks=pytest.mark.slow),
        pytest.param(256, "*bf16", EVERYTHING | {"QUANTISED": False}, marks=pytest.mark.slow),
    ],
)
def test_it_compiles(tmp_path, monkeypatch, capability, H, pages, options):
    if pages == "*fp8e4nv" and capability < 89:
        pytest.skip("refused")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pallas_kernels.paged_attention import triton_source

    fixed = {"N": 8, "K": 2, "H": H, "PAGE": 16, "SCALE": 0.1, "SPLIT": 512, "PRECISION": "tf32"}
    for decode in (True, False):
        config = backend.DECODE if decode else backend.CHUNKS
        rows, keys = backend._tiles(4, 2 * H, decode, config)
        built = build(
            triton_source.attend, capability, pages, config.warps, config.stages,
            SPLITS=8 if decode else 1,
            BLOCK_M=rows, BLOCK_KV=keys, **fixed, **options,
        )  # fmt: skip
        assert built.metadata.shared <= dict(GENERATIONS.values())[capability]
        spills = spilled(built, tmp_path)
        shared = built.metadata.shared
        print(f"{capability / 10}, H={H}, {pages}, {decode=}: spills {spills}, shared {shared}")
        assert spills <= 512
    assert spilled(build(triton_source.merge, capability, pages, 1, 1, **fixed, **options),
                   tmp_path) == 0  # fmt: skip


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
    answers = {}
    for number, job in enumerate(task["jobs"]):
        triton_process.plant(paged_attention, task, number, job.get("replace"))
        batch = (
            in_other_company(37, **COMPANY)[job["company"]][0]
            if "company" in job
            else (batch_of(job["case"]))
        )
        arrays, options = batch.arguments()
        invariant = job.get("invariant", False)
        out = backend.paged_attention(*arrays, **options, invariant=invariant, config=small)
        answers[str(number)] = np.asarray(out)
    np.savez(task["answer"], **answers)
