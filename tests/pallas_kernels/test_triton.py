"""The Triton kernels: interpreted on a CPU, compiled for three GPUs, lowered from JAX.

What needs triton, torch or jax-triton is skipped where they are not installed. Run as a program,
this file is the interpreter's process: TRITON_INTERPRET is read when triton is imported.
"""

import importlib.util
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _triton_compat
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention import triton as attention_backend
from pallas_kernels.matmul import reference as matmul_reference
from pallas_kernels.matmul import triton as matmul_backend
from tests.pallas_kernels import triton_process

# Python 3.13 finds fault with how triton builds syntax trees.
pytestmark = pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")

HAS = {name: importlib.util.find_spec(name) is not None for name in ("triton", "torch")}
_interpreted = pytest.mark.skipif(
    not all(HAS.values()), reason="Triton's interpreter needs triton and torch: pip install both"
)
_compiled = pytest.mark.skipif(not HAS["triton"], reason="needs triton: pip install triton")


def interpreted(test):
    """A test of `make parity`, where Triton and torch are: the first waits for all jobs."""
    return pytest.mark.timeout(2400)(pytest.mark.live(_interpreted(test)))


def compiled(test):
    """A test of `make parity`, where Triton is installed."""
    return pytest.mark.live(_compiled(test))


N, K, H = 4, 2, 16

# T, S, options
CASES = {
    "causal": (21, 21, {"causal": True}),
    "full": (21, 27, {"scale": 0.5}),
    "segments and sinks": (
        29, 29, {"causal": True, "sinks": [0.5, -1.0, 2.0, -np.inf],
                 "segments": [[1] * 12 + [2] * 14 + [0] * 3, [1] * 5 + [3] * 24]},
    ),
    "soft cap": (20, 33, {"causal": True, "q_offset": [13, 13], "soft_cap": 2.0}),
    "two-sided window": (29, 29, {"window": 6}),
    "window, rows that see nothing": (
        18, 26, {"causal": True, "window": 9, "q_offset": [8, -7]},
    ),
}  # fmt: skip

# Mistakes planted in the source, and a case that shows each.
MISTAKES = {
    "delta left out": ("full", "dweights - delta", "dweights"),
    "mask off by one": ("causal", "tl.minimum(positions + 1, S)", "tl.minimum(positions + 2, S)"),
    "no shrinking of the sums": ("full", "acc * shrink[:, None]", "acc"),
    "unmasked too early": ("causal", "tl.maximum(first + 1, 0)", "tl.maximum(last + 1, 0)"),
    "window off by one": ("two-sided window", "keys > positions - window",
                          "keys >= positions - window"),
    "wrong key head": ("full", "n // (N // K) * H", "n % K * H"),
}  # fmt: skip


def results(attention, name: str) -> dict[str, np.ndarray]:
    """out, lse and gradients of a case, from cotangents of out and of what is finite of lse."""
    T, S, options = CASES[name]
    rng = np.random.default_rng(0)
    shapes = ((2, T, N, H), (2, S, K, H), (2, S, K, H), (2, T, N, H), (2, N, T))
    q, k, v, dout, dlse = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    options = {key: jnp.asarray(o) if isinstance(o, list) else o for key, o in options.items()}
    if "segments" in options:
        options["segment_ids"] = (options["segments"], options.pop("segments"))
    sinks = options.pop("sinks", None)

    def run(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, **options)

    (out, lse), pull = jax.vjp(run, q, k, v, sinks)
    dq, dk, dv, dsinks = pull((dout, jnp.where(jnp.isfinite(lse), dlse, 0.0)))
    arrays = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {n: np.asarray(x) for n, x in {**arrays, "dsinks": dsinks}.items() if x is not None}


SHAPES = [(33, 40, 21), (48, 32, 64)]  # of products
answers = triton_process.answers(
    __name__,
    {name: {"case": name} for name in CASES} | {str(shape): {"shape": shape} for shape in SHAPES},
)
mistaken = triton_process.answers(
    __name__, {name: {"case": of, "replace": pair} for name, (of, *pair) in MISTAKES.items()}
)


@interpreted
def test_attention_interpreted(answers):
    for name in CASES:
        got, want = answers[name], results(reference.attention, name)
        assert got.keys() == want.keys()
        for part in want:
            np.testing.assert_allclose(got[part], want[part], atol=2e-5, err_msg=f"{name}: {part}")


@interpreted
def test_a_mistake_shows(mistaken):
    for mistake, (name, *_) in MISTAKES.items():
        got, want = mistaken[mistake], results(reference.attention, name)
        assert not all(np.allclose(got[part], want[part], atol=2e-5) for part in want), mistake


def factors(M, width, columns):
    rng = np.random.default_rng(0)
    shapes = (M, width), (width, columns)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float16) for shape in shapes]


@interpreted
def test_matmul_interpreted(answers):
    for shape in SHAPES:
        want = matmul_reference.matmul(*factors(*shape))
        np.testing.assert_allclose(answers[str(shape)]["out"], want, rtol=2e-3, atol=1e-4)


GENERATIONS = {"ada": (89, 101_376), "ampere": (80, 166_912), "hopper": (90, 232_448)}
PLAIN = {"CAUSAL": True, "WINDOW": False, "OFFSET": False, "SEGMENTS": False, "SINKS": False,
         "SOFT_CAP": None, "K": 4}  # fmt: skip
EVERYTHING = {"CAUSAL": True, "WINDOW": True, "OFFSET": True, "SEGMENTS": True, "SINKS": True,
              "SOFT_CAP": 30.0, "K": 2}  # fmt: skip


def build(
    kernel, capability: int, num_warps: int, num_stages: int, more_kinds: dict | None = None,
    **constants,
):  # fmt: skip
    """A kernel compiled by Triton down to machine code for a GPU that need not be here."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "sinks_ptr": "*fp32", "window_ptr": "*i32",
             "q_offset_ptr": "*i32", "q_segments_ptr": "*i32", "kv_segments_ptr": "*i32",
             "T": "i32", "S": "i32", "section": "i32", **(more_kinds or {})}  # fmt: skip
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*bf16") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(built, folder: Path) -> int:
    """Bytes of registers a thread keeps in memory, by NVIDIA's tool in triton's package."""
    triton = pytest.importorskip("triton")
    (folder / "kernel.cubin").write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"STACK:(\d+)", text))


@compiled
@pytest.mark.parametrize("generation", sorted(GENERATIONS))
@pytest.mark.parametrize(
    ("H", "options"),
    [(128, PLAIN), *((H, EVERYTHING) for H in sorted(attention_backend.TILES["hopper"]))],
)
def test_attention_compiles(tmp_path, monkeypatch, generation, H, options):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pallas_kernels.flash_attention import triton_source

    capability, shared = GENERATIONS[generation]
    assert attention_backend.generation(capability) == generation
    passes = attention_backend.TILES[generation][H]
    for kernel, tiles in (
        (triton_source.forward, passes.forward),
        (triton_source.backward_dq, passes.dq),
        (triton_source.backward_dkv, passes.dkv),
    ):
        built = build(
            kernel, capability, tiles.num_warps, tiles.num_stages, N=4, H=H, SCALE=0.1,
            BLOCK_Q=tiles.block_q, BLOCK_KV=tiles.block_kv, **options,
        )  # fmt: skip
        name = kernel.__name__
        assert built.metadata.shared <= shared, f"{name}: {built.metadata.shared} bytes"
        assert ("wgmma" in built.asm["ptx"]) == (generation == "hopper"), name
        spills = spilled(built, tmp_path)
        print(f"capability {capability / 10}, H={H}: {name} spills {spills} bytes")
        assert spills <= 2048, name


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_matmul_compiles(tmp_path, monkeypatch, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_triton_compat, "capability", lambda: capability)
    from pallas_kernels.matmul import triton_source

    tiles = matmul_backend.tiles(4096, 4096)
    built = build(
        triton_source.matmul, capability, tiles.num_warps, tiles.num_stages, M=4096, N=4096,
        K=1000, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        GROUP=tiles.group,
    )  # fmt: skip
    assert built.metadata.shared <= dict(GENERATIONS.values())[capability]
    assert spilled(built, tmp_path) == 0


@pytest.fixture
def on_cuda(monkeypatch):
    """Lowers a function of arrays for a CUDA device of a given capability, from a CPU."""
    if reason := _triton_compat.missing():
        pytest.skip(reason)
    try:
        _triton_compat._triton_call()
    except ImportError as error:
        pytest.skip(f"jax-triton needs jax's CUDA plugin: {error}")

    def lower(function, capability, *args):
        monkeypatch.setattr(_triton_compat, "capability", lambda: capability)
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower


@pytest.mark.parametrize("options", ["every option", "plain"])
def test_attention_lowers(on_cuda, options):
    B, T, S = 2, 100, 130
    shape = jax.ShapeDtypeStruct
    q, k = shape((B, T, 4, 64), jnp.bfloat16), shape((B, S, 2, 64), jnp.bfloat16)
    more = {}
    if options == "every option":
        more = {
            "segment_ids": (shape((B, T), jnp.int32), shape((B, S), jnp.int32)),
            "sinks": shape((4,), jnp.bfloat16),
            "q_offset": shape((B,), jnp.int32),
            "window": shape((), jnp.int32),
        }

    def loss(q, k, v, more):
        out, lse = attention_backend.attention(q, k, v, causal=True, **more)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    def slopes(q, k, v, more):
        return jax.grad(loss, argnums=(0, 1, 2, 3), allow_int=True)(q, k, v, more)

    text = on_cuda(slopes, 90, q, k, k, more)
    assert len(re.findall(r"custom_call @triton_kernel_call", text)) == 3


@pytest.mark.parametrize("T", [1, 7])
def test_attention_lowers_short(on_cuda, T):
    q = jax.ShapeDtypeStruct((1, T, 2, 64), jnp.float16)
    k = jax.ShapeDtypeStruct((1, 1, 1, 64), jnp.float16)
    assert "triton_kernel_call" in on_cuda(attention_backend.attention, 80, q, k, k)


def test_matmul_lowers(on_cuda):
    a, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((100, 33), (33, 70)))
    assert "triton_kernel_call" in on_cuda(matmul_backend.matmul, 89, a, b)


def test_refusals():
    facts = {"platform": "gpu", "dtype": jnp.bfloat16, "H": 64, "T": 3, "S": 3, "causal": True}
    assert "cpu" in (attention_backend.refusal(**{**facts, "platform": "cpu"}) or "")
    assert "float32" in (attention_backend.refusal(**{**facts, "dtype": jnp.float32}) or "")
    assert "96" in (attention_backend.refusal(**{**facts, "H": 96}) or "")
    assert "soft cap" in (attention_backend.refusal(**facts, soft_cap=-1.0) or "")
    assert attention_backend.refusal(**facts) == _triton_compat.missing()
    assert "cpu" in (matmul_backend.refusal(platform="cpu", dtype=jnp.bfloat16) or "")
    assert "int8" in (matmul_backend.refusal(platform="gpu", dtype=jnp.int8) or "")


def test_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(_triton_compat, "missing", lambda: None)
    monkeypatch.setattr(_triton_compat, "capability", lambda: 75)
    reason = attention_backend.refusal(platform="gpu", dtype=jnp.bfloat16, H=64)
    assert reason is not None and "7.5" in reason


@pytest.mark.parametrize(
    ("jax_triton", "triton", "works"),
    [("0.3.1", "3.6.0", True), ("0.3.1", "3.5.1", False), ("0.4.1", "3.6.0", False),
     ("0.4.1", "3.7.1", True)],
)  # fmt: skip
def test_pairs_of_versions(monkeypatch, jax_triton, triton, works):
    versions = {"jax-triton": jax_triton, "triton": triton}
    monkeypatch.setattr(_triton_compat, "version", versions.__getitem__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert (_triton_compat.missing() is None) == works


def test_errors():
    q = jnp.zeros((1, 4, 2, 96), jnp.bfloat16)
    with pytest.raises(ValueError, match="head width of 64, 128, 256, not 96"):
        attention_backend.attention(q, q, q)
    with pytest.raises(ValueError, match=r"want \[M, K\] and \[K, N\]"):
        matmul_backend.matmul(q[0, 0], q[0, 0])


def test_every_capability_has_tiles():
    for capability in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        passes = attention_backend.TILES[attention_backend.generation(capability)][128]
        assert all(tiles.block_q >= 16 for tiles in (passes.forward, passes.dq, passes.dkv))


if __name__ == "__main__":
    task = triton_process.mend()
    triton_process.stand_in(_triton_compat)
    attention_backend._misfit = lambda *_: None  # float32 and H=16: small and exact
    attention_backend.SECTION_BYTES = 5000  # sections of some heads, not of all
    small = attention_backend.Tiles(16, 8, 4, 2)
    attention_backend.TILES["hopper"][H] = attention_backend.Passes(small, small, small)
    matmul_backend.SMALL = matmul_backend.Tiles(16, 16, 16, 2, 4, 2)

    def run(job: dict) -> dict[str, np.ndarray]:
        if "case" in job:
            return results(attention_backend.attention, job["case"])
        return {"out": np.asarray(matmul_backend.matmul(*factors(*job["shape"])))}

    triton_process.answer(importlib.import_module("pallas_kernels.flash_attention"), task, run)
