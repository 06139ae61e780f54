"""A layer of one token: interpreted on a CPU phase by phase, compiled for three GPUs.

Run as a program, this file is the interpreter's process: TRITON_INTERPRET is read when triton is
imported.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _triton_compat, decode_layer
from pallas_kernels.decode_layer import reference
from pallas_kernels.decode_layer import triton as backend
from tests.pallas_kernels import triton_process
from tests.pallas_kernels.test_triton import GENERATIONS, build, compiled, interpreted, spilled

PROGRAMS = 6
FORMS = {
    "norms": {"D": 24, "F": 40, "N": 4, "K": 2, "H": 16, "norms": True},
    "biases": {"D": 20, "F": 33, "N": 3, "K": 3, "H": 16, "bias": True},
}
# length, whether the token is kept
PLACES = {"first": (1, True), "within": (21, True), "dropped": (21, False), "full": (32, True)}
MISTAKES = {
    "its own key is not seen": ("tl.where(fresh, k_new, k)", "k"),
    "no residual": ("x + y", "y"),
    "key head of another": ("head * G + member, member < G, q_norm", "member, member < G, q_norm"),
    "a run left out": ("live = splits * run < length", "live = splits * run + run < length"),
    "norm left out": ("acc *= 1 / tl.sqrt(", "acc *= 1 + 0 * tl.sqrt("),
}


CASES = {f"norms {place}": {"form": "norms", "place": place} for place in PLACES}
CASES["biases within"] = {"form": "biases", "place": "within"}
answers = triton_process.answers(__name__, CASES)
mistaken = triton_process.answers(
    __name__,
    {name: {**CASES["norms within"], "replace": pair} for name, pair in MISTAKES.items()},
)


def arguments(form: dict, length: int, kept: bool) -> dict[str, Any]:
    """A layer of random weights, and pages that hold `length` - 1 tokens."""
    D, F, N, K, H = (form[name] for name in "DFNKH")
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    R = (N + 2 * K) * H
    weights = decode_layer.LayerWeights(
        attn_norm=1 + normal(D, scale=0.1), qkv=normal(R, D, scale=D**-0.5),
        o=normal(D, N * H, scale=(N * H) ** -0.5), mlp_norm=1 + normal(D, scale=0.1),
        gate_up=normal(2 * F, D, scale=D**-0.5), down=normal(D, F, scale=F**-0.5),
        qkv_bias=normal(R) if form.get("bias") else None,
        q_norm=1 + normal(H, scale=0.1) if form.get("norms") else None,
        k_norm=1 + normal(H, scale=0.1) if form.get("norms") else None,
    )  # fmt: skip
    page, pages = 8, 6
    table = rng.permutation(pages)[:4].astype(np.int32)
    slot = table[(length - 1) // page] * page + (length - 1) % page if kept else -1
    angle = (length - 1) * 0.3 ** np.arange(H // 2)
    held = rng.standard_normal((2, pages, K, page, H)).astype(np.float32)
    seen = np.zeros((pages, page), bool)
    for position in range(length - 1):
        seen[table[position // page], position % page] = True
    held = np.where(seen[None, :, None, :, None], held, np.nan)
    return {
        "x": normal(D), "k_pages": jnp.asarray(held[0]), "v_pages": jnp.asarray(held[1]),
        "weights": weights, "cos": jnp.cos(angle).astype(jnp.float32),
        "sin": jnp.sin(angle).astype(jnp.float32), "table": jnp.asarray(table),
        "length": jnp.int32(length), "slot": jnp.int32(slot),
    }  # fmt: skip


OPTIONS = {"scale": 0.25, "eps": 1e-5}


def wanted(form: dict, length: int, kept: bool) -> list[np.ndarray]:
    made = reference.decode_layer(**arguments(form, length, kept), **OPTIONS)
    return [np.asarray(a) for a in made]


@interpreted
def test_interpreted_it_is_the_mathematics(answers):
    for name, job in CASES.items():
        for part, want in enumerate(wanted(FORMS[job["form"]], *PLACES[job["place"]])):
            np.testing.assert_allclose(answers[name][str(part)], want, atol=2e-5, err_msg=name)


@interpreted
def test_a_mistake_shows(mistaken):
    want = wanted(FORMS["norms"], *PLACES["within"])
    for mistake in MISTAKES:
        assert not np.allclose(mistaken[mistake]["0"], want[0], atol=1e-3), mistake


def test_what_it_refuses(monkeypatch):
    given = arguments(FORMS["norms"], 1, True)
    bf16 = jax.tree.map(lambda a: a.astype(jnp.bfloat16), given["weights"])
    shape = given["k_pages"].shape

    def refusal(weights=bf16, dtype=jnp.bfloat16, platform: str | None = "gpu"):
        return decode_layer.supported(weights, shape, dtype, platform=platform) or ""

    assert "arrays are on cpu" in refusal(platform=None)
    monkeypatch.setattr(_triton_compat, "missing", lambda: "not installed")
    assert refusal() == "not installed"
    monkeypatch.setattr(_triton_compat, "missing", lambda: None)
    monkeypatch.setattr(_triton_compat, "capability", lambda: 75)
    assert "7.5" in refusal()
    monkeypatch.setattr(_triton_compat, "capability", lambda: 90)
    assert "partition" in refusal()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert refusal() == ""
    assert "float32" in refusal(given["weights"], jnp.float32)
    assert "int8" in refusal(dtype=jnp.int8)
    monkeypatch.setattr(decode_layer, "_programs", lambda K: 1)
    assert "2 key heads" in refusal()


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_it_compiles(tmp_path, monkeypatch, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = compiled_for(capability, backend.Config())
    assert built.metadata.shared <= dict(GENERATIONS.values())[capability]
    assert built.asm["ptx"].count("ld.acquire.gpu") == 4, "programs meet four times"
    assert spilled(built, tmp_path) == 0


def compiled_for(capability: int, config: Any) -> Any:
    """The kernel for Qwen3-0.6B's layer."""
    from pallas_kernels.decode_layer import triton_source

    sizes = backend.sizes(1024, 3072, 16, 8, 128, 128, config)
    return build(
        triton_source.layer, capability, config.warps, 2, more_kinds=KINDS, PAGE=16, SCALE=0.1,
        EPS=1e-6, NORMED=True, BIAS=False, FIRST=0, LAST=4, **sizes,
    )  # fmt: skip


FLOATS = ("x", "cos", "sin", "qkv", "parts", "lse", "heads", "inner")
KINDS = {f"{name}_ptr": "*fp32" for name in FLOATS} | {
    "x_in": "*fp32", "counters_in": "*i32", "counters_ptr": "*i32", "table_ptr": "*i32",
    "facts_ptr": "*i32",
}  # fmt: skip


if __name__ == "__main__":
    import torch

    scratch: list[Any] = []

    def call(kernel, inputs, outputs, *, programs, num_warps, num_stages, aliases, **constants):
        """What `_triton_compat.call` does, by the interpreter; scratch outlives a phase."""
        given = [torch.from_numpy(np.array(x)) for x in inputs]
        if not scratch:
            scratch.extend(torch.full(o.shape, np.nan) for o in outputs[len(aliases) :])
        made = [given[i] for i in aliases] + scratch
        kernel[(programs,)](*given, *made, **constants)
        return [jnp.asarray(out.numpy()) for out in made]

    task = triton_process.mend()
    _triton_compat.call = call
    small = backend.Config(tile=64, columns=16, keys=16)

    def run(job: dict) -> dict[str, np.ndarray]:
        scratch.clear()
        form = FORMS[job["form"]]
        given = arguments(form, *PLACES[job["place"]])
        facts = jnp.stack([given.pop("length"), given.pop("slot")])
        state = [given.pop(n) for n in ("x", "k_pages", "v_pages")]
        state.append(decode_layer.counters(form["K"]))
        for phase in range(5):
            state = backend.launch(
                *state[:4], **given, facts=facts, programs=PROGRAMS, config=small,
                phases=(phase, phase), **OPTIONS,
            )  # fmt: skip
        assert not np.any(state[3]), "counters are left"
        return {str(part): np.asarray(state[part]) for part in range(3)}

    triton_process.answer(decode_layer, task, run)
