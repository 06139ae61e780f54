"""Rows of a projection into pages: the kernel interpreted, and compiled for three GPUs.

Run as a program, this file is the interpreter's process: TRITON_INTERPRET is read when triton is
imported.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _triton_compat, page_write
from pallas_kernels.page_write import reference
from tests.pallas_kernels import triton_process
from tests.pallas_kernels.test_triton import build, compiled, interpreted, on_cuda, spilled

__all__ = ["on_cuda"]  # a fixture

CASES = {
    "plain": {"N": 4, "K": 2, "H": 16},
    "norms": {"N": 3, "K": 3, "H": 16, "norms": True},
    "biases, norms from one": {"N": 6, "K": 1, "H": 32, "bias": True, "norms": True, "one": True},
}
MISTAKES = {
    "another's page": ("tl.int64) * K * PAGE", "tl.int64) * PAGE"),
    "the first place left out": ("if slot >= 0:", "if slot > 0:"),
    "queries' norm for keys": ("tl.where(is_query[:, None], of_query, of_key)", "of_query"),
    "turned the other way": ("low * cos - high * sin", "low * cos + high * sin"),
    "keys for values": ("(N + K + key)[:, None]", "(N + key)[:, None]"),
}  # fmt: skip
OPTIONS = {"eps": 1e-3}
answers = triton_process.answers(
    __name__,
    {name: {"case": name} for name in CASES}
    | {name: {"case": "norms", "replace": pair} for name, pair in MISTAKES.items()},
)


def arguments(name: str) -> dict:
    """Rows of seven tokens, two of which are not kept, and pages of NaN."""
    N, K, H = (CASES[name][key] for key in "NKH")
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    T, page, R = 7, 4, (N + 2 * K) * H
    angle = rng.uniform(0, 6, (T, H // 2))
    pages = jnp.full((5, K, page, H), jnp.nan)
    return {
        "qkv": normal(T, R), "k_pages": pages, "v_pages": pages,
        "cos": jnp.asarray(np.cos(angle), jnp.float32),
        "sin": jnp.asarray(np.sin(angle), jnp.float32),
        "slots": jnp.asarray([6, 19, -1, 0, 7, -1, 12], jnp.int32),
        "bias": normal(R) if CASES[name].get("bias") else None,
        "norms": (normal(H), normal(H)) if CASES[name].get("norms") else None,
        "plus_one": CASES[name].get("one", False),
    }  # fmt: skip


def wanted(name: str) -> list[np.ndarray]:
    return [np.asarray(a) for a in reference.page_write(**arguments(name), **OPTIONS)]


def equal(found: dict[str, np.ndarray], name: str) -> bool:
    return all(
        np.allclose(found[str(i)], want, atol=2e-5, equal_nan=True)
        for i, want in enumerate(wanted(name))
    )


@interpreted
def test_interpreted_it_is_the_specification(answers):
    for name in CASES:
        assert equal(answers[name], name), name


@interpreted
def test_a_mistake_shows(answers):
    for mistake in MISTAKES:
        assert not equal(answers[mistake], "norms"), mistake


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_it_compiles(tmp_path, monkeypatch, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pallas_kernels.page_write import triton_source

    kinds = dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32") | {"slots_ptr": "*i32"}
    built = build(
        triton_source.write, capability, 2, 1, kinds, N=16, K=8, H=128, PAGE=16, HEADS=32,
        KEY_HEADS=8, BIAS=False, NORMED=True, EPS=1e-6, PLUS_ONE=False,
    )  # fmt: skip
    assert spilled(built, tmp_path) == 0
    assert "ld.global.v4" in built.asm["ptx"], "16 bytes at a time"


def test_it_lowers(on_cuda):
    shape = jax.ShapeDtypeStruct
    pages = shape((50, 8, 16, 128), jnp.bfloat16)
    angle, norm = shape((9, 64), jnp.float32), shape((128,), jnp.bfloat16)
    text = on_cuda(
        lambda qkv, k, v, cos, sin, slots, norms: page_write.page_write(
            qkv, k, v, cos, sin, slots, norms=norms, eps=1e-6
        ),
        90, shape((9, 32 * 128), jnp.bfloat16), pages, pages, angle, angle,
        shape((9,), jnp.int32), (norm, norm),
    )  # fmt: skip
    assert text.count("custom_call @triton_kernel_call") == 1


def test_what_it_refuses(monkeypatch):
    def refusal(dtype=jnp.bfloat16, width=4096, shape=(9, 8, 16, 128), pages=jnp.bfloat16):
        return page_write.supported(dtype, width, shape, pages, platform="gpu") or ""

    assert "cpu" in (page_write.supported("float16", 64, (1, 1, 8, 16), "float16") or "")
    monkeypatch.setattr(_triton_compat, "refusal", lambda platform: None)
    assert "partition" in refusal()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert refusal() == ""
    assert "float32" in refusal(dtype=jnp.float32)
    assert "int8" in refusal(pages=jnp.int8)
    assert "not 96" in refusal(shape=(9, 8, 16, 96))
    assert "16384" in refusal(width=2**15)


if __name__ == "__main__":
    import torch

    def call(kernel, inputs, outputs, *, programs, num_warps, num_stages, aliases, **constants):
        """What `_triton_compat.call` does, by the interpreter."""
        given = [torch.from_numpy(np.array(x)) for x in inputs]
        made = [torch.full(outputs[0].shape, np.nan), given[1], given[2]]
        kernel[(programs,)](*given, *made, **constants)
        return [jnp.asarray(out.numpy()) for out in made]

    task = triton_process.mend()
    _triton_compat.call = call

    def run(job: dict) -> dict[str, np.ndarray]:
        made = page_write.page_write(**arguments(job["case"]), **OPTIONS)
        return {str(i): np.asarray(x) for i, x in enumerate(made)}

    triton_process.answer(page_write, task, run)
