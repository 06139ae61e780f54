"""The Triton kernel of integer weights: interpreted on a CPU, compiled for three GPUs, lowered.

Run as a program, this file is the interpreter's process: TRITON_INTERPRET is read when triton is
imported.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantised_matmul import formats, reference
from pallas_kernels.quantised_matmul import triton as backend
from tests.pallas_kernels import triton_process
from tests.pallas_kernels.test_triton import (  # noqa: F401 (a fixture)
    GENERATIONS,
    build,
    compiled,
    interpreted,
    on_cuda,
    spilled,
)

# Python 3.13 finds fault with how triton builds syntax trees.
pytestmark = pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")

SOURCE = Path(backend.__file__).with_name("triton_source.py")

# Rows, outputs, inputs, inputs a group, bits, tiles
CASES = {
    "4 bits, splits": (3, 40, 192, 96, 4, (16, 64, 4)),
    "4 bits, one group": (16, 32, 64, 64, 4, (32, 32, 1)),
    "8 bits, more splits than steps": (1, 24, 96, 32, 8, (16, 32, 9)),
    "8 bits, many rows": (33, 16, 128, 64, 8, (16, 128, 1)),
}

MISTAKES = {  # a case, and what is replaced in the source by what
    "a group's scale too late": ("4 bits, splits", "group * N + outputs", "outputs"),
    "high and low confused": ("4 bits, one group", "tl.trans(even)", "tl.trans(odd)"),
    "a split starts late": ("4 bits, splits", "split * EACH, tl", "split * EACH + 1, tl"),
    "rows as long as a tile": (
        "4 bits, splits", "rows[None, :] * N", "rows[None, :] * BLOCK_N"
    ),
}  # fmt: skip


def operands(name):
    M, N, K, group, bits, _ = CASES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(M, K)), jnp.float16)
    values, scales = formats.integers(
        jnp.asarray(rng.normal(size=(N, K)), jnp.float32), bits, group
    )
    return x, values, scales


answers = triton_process.answers(
    __name__,
    {name: {"case": name} for name in CASES}
    | {name: {"case": of, "replace": pair} for name, (of, *pair) in MISTAKES.items()},
)


def right(found: dict[str, np.ndarray], name: str) -> bool:
    wanted = np.asarray(reference.weight_matmul(*operands(name)), np.float32)
    return np.allclose(found["out"], wanted, rtol=2e-3, atol=2e-3)


@interpreted
def test_interpreted_it_is_the_specification(answers):
    for name in CASES:
        assert right(answers[name], name), name


@interpreted
def test_a_mistake_shows(answers):
    for mistake, (name, *_) in MISTAKES.items():
        assert not right(answers[mistake], name), mistake


@compiled
@pytest.mark.parametrize("generation", sorted(GENERATIONS))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("block_m", "dtype"), [(16, "*bf16"), (64, "*fp16")])
def test_it_compiles(tmp_path, monkeypatch, generation, bits, block_m, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pallas_kernels.quantised_matmul import triton_source

    capability, shared = GENERATIONS[generation]
    kernel, tiles = triton_source.weight_matmul, backend.Tiles()
    kinds = dict.fromkeys(kernel.arg_names, "*fp32")
    kinds |= {"x_ptr": dtype, "values_ptr": "*i8" if bits == 8 else "*u8"}
    built = build(
        kernel, capability, tiles.num_warps, tiles.num_stages, kinds, M=block_m, N=1000, K=4096,
        GROUP=128, BITS=bits, BLOCK_M=block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        SPLITS=8,
    )  # fmt: skip
    assert built.metadata.shared <= shared
    assert spilled(built, tmp_path) == 0
    assert ("wgmma" in built.asm["ptx"]) == (generation == "hopper")


@pytest.mark.parametrize(("rows", "splits"), [(1, None), (64, 1)])
@pytest.mark.parametrize("bits", [8, 4])
def test_it_lowers(on_cuda, bits, rows, splits):  # noqa: F811
    x = jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
    width, dtype = (64, jnp.int8) if bits == 8 else (32, jnp.uint8)
    values = jax.ShapeDtypeStruct((4, 100, width), dtype)
    scales = jax.ShapeDtypeStruct((4, 100), jnp.float32)
    tiles = backend.Tiles(splits=splits)
    text = on_cuda(lambda *of: backend.weight_matmul(*of, tiles=tiles), 90, x, values, scales)
    assert len(re.findall(r"custom_call @triton_kernel_call", text)) == 1


def test_errors():
    values, scales = jnp.zeros((2, 8, 32), jnp.int8), jnp.zeros((2, 8))
    with pytest.raises(ValueError, match="not float32"):
        backend.weight_matmul(jnp.zeros((4, 64)), values, scales)
    with pytest.raises(ValueError, match=r"x\(65, 64\).*up to 64 rows, not 65"):
        backend.weight_matmul(jnp.zeros((65, 64), jnp.bfloat16), values, scales)


if __name__ == "__main__":
    from pallas_kernels import quantised_matmul

    task = triton_process.mend()
    triton_process.stand_in(backend._triton_compat)

    def run(job):
        tiles = backend.Tiles(*CASES[job["case"]][-1])
        return {"out": backend.weight_matmul(*operands(job["case"]), tiles=tiles)}

    triton_process.answer(quantised_matmul, task, run)
