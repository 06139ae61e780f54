"""Drawing tokens: the kernel interpreted against its specification, and compiled for three GPUs.

Run as a program, this file is the interpreter's process: TRITON_INTERPRET is read when triton is
imported.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _triton_compat, token_draw
from pallas_kernels.token_draw import reference
from tests.pallas_kernels import triton_process
from tests.pallas_kernels.test_triton import build, compiled, interpreted, spilled

S, V, BLOCK = 40, 77, 16
MISTAKES = {
    "the block before": ("passed <= target", "passed - weights <= target - total"),
    "what stands before is left out": ("tl.cumsum(within, 0) + before", "tl.cumsum(within, 0)"),
    "no temperature": ('other=float("-inf")) / warmth', 'other=float("-inf"))'),
    "another's best": ("bests_ptr + row * BLOCKS + winner", "bests_ptr + row * BLOCKS"),
}


answers = triton_process.answers(
    __name__, {"right": {}} | {name: {"replace": pair} for name, pair in MISTAKES.items()}
)


def rows() -> list[np.ndarray]:
    """Logits, of which some are -inf, temperatures, some of them 0, and numbers from 0 to 1."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(S, V)).astype(np.float32) * 3
    logits[rng.random((S, V)) < 0.2] = -np.inf
    temperature = np.where(np.arange(S) % 4 == 0, 0.0, rng.uniform(0.3, 2.0, S))
    uniform = rng.random(S)
    uniform[:3] = 0.0, 0.0, 0.999999
    return [logits, temperature.astype(np.float32), uniform.astype(np.float32)]


@interpreted
def test_interpreted_it_is_the_specification(answers):
    for part, want in enumerate(reference.draw(*map(jnp.asarray, rows()))):
        np.testing.assert_allclose(answers["right"][str(part)], want, atol=1e-5)


@interpreted
def test_a_mistake_shows(answers):
    want = np.asarray(reference.draw(*map(jnp.asarray, rows()))[0])
    for mistake in MISTAKES:
        assert not np.array_equal(answers[mistake]["0"], want), mistake


@compiled
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_it_compiles(tmp_path, monkeypatch, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pallas_kernels.token_draw import triton_source

    whole = ("counters_in", "counters_ptr", "tokens_ptr", "bests_ptr")
    kinds = dict.fromkeys(triton_source.draw.arg_names, "*fp32") | dict.fromkeys(whole, "*i32")
    built = build(triton_source.draw, capability, 8, 1, more_kinds=kinds, V=151936,
                  BLOCK=token_draw.BLOCK, BLOCKS=38, WIDE=64)  # fmt: skip
    assert spilled(built, tmp_path) == 0


if __name__ == "__main__":
    import torch

    def call(kernel, inputs, outputs, *, programs, num_warps, num_stages, aliases, **constants):
        """What `_triton_compat.call` does, by the interpreter, on concrete arrays."""
        given = [torch.from_numpy(np.array(x)) for x in inputs]
        made = [torch.zeros(o.shape, dtype=getattr(torch, o.dtype.name)) for o in outputs]
        made[0] = given[0]
        kernel[(programs,)](*given, *made, **constants)
        assert not made[0].any(), "counters are left"
        return [out.numpy() for out in made]

    task = triton_process.mend()
    _triton_compat.call = call

    def run(_) -> dict[str, np.ndarray]:
        made = token_draw.draw(*map(jnp.asarray, rows()), block=BLOCK)
        return {str(part): made[part] for part in range(2)}

    triton_process.answer(token_draw, task, run)
