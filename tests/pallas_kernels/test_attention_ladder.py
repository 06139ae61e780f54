"""Every step of attention's ladder: interpreted without a race, lowered, and what it moves."""

import importlib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.ladder import STEPS, account
from pallas_kernels.interpreter import WHOLE, RaceError, interpret

newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")


def step(name):
    return importlib.import_module(f"pallas_kernels.flash_attention.ladder.{name}").attention


def inputs(B, T, S, N, H, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, N, H), (B, S, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def held(name, B, T, S, N, H, dtype=jnp.bfloat16):
    q, k, v = inputs(B, T, S, N, H, dtype)
    found = interpret(step(name), q, k, v)
    assert found.dtype == dtype and found.shape == q.shape
    wanted, _ = reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    error = np.abs(np.asarray(found, np.float32) - np.asarray(wanted)).max()
    assert error < 2**-8 * np.abs(np.asarray(wanted)).max() * 2


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_attention_and_does_not_race(name):
    held(name, 1, 128, 384, 1, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_wider_heads_of_float16(name):
    held(name, 1, 128, 256, 1, 128, jnp.float16)


MISTAKES = {  # the step, what is replaced in its source by what
    "keys and values before they arrive": (
        "flash_2", "plgpu.barrier_wait(arrived.at[slot])", "pass"
    ),
    "sums before they arrive": ("flash_1", "plgpu.barrier_wait(here.at[0])", "pass"),
    "values before they arrive": (
        "flash_3", "plgpu.barrier_wait(v_here.at[last])\n                    values", "values"
    ),
    "values given back early": (
        "flash_3", "made = read(out)\n                    release(v_smem, v_free, last)",
        "plgpu.barrier_arrive(v_free.at[last]); made = read(out); reads_end(values, interpret=True)"
    ),
}  # fmt: skip


@newer
@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_is_found(name):
    of, right, wrong = MISTAKES[name]
    source = Path(importlib.import_module(step(of).__module__).__file__).read_text()
    assert source.count(right) == 1
    mistaken = types.ModuleType("mistaken")
    exec(source.replace(right, wrong), mistaken.__dict__)
    with pytest.raises(RaceError):
        interpret(mistaken.attention, *inputs(1, 128, 512, 1, 64))


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_lowers_for_the_chip(name, H):
    q, k = (jax.ShapeDtypeStruct((2, n, 4, H), jnp.bfloat16) for n in (1024, 2048))
    lowered = jax.jit(step(name)).trace(q, k, k).lower(lowering_platforms=("cuda",))
    assert ("mosaic_gpu" in lowered.as_text()) == (name != "standard")


@pytest.mark.parametrize(
    ("shapes", "dtype", "says"),
    [
        (((1, 128, 1, 64), (1, 128, 2, 64)), jnp.bfloat16, r"want \[B,T,N,H\]"),
        (((1, 128, 1, 64), (1, 128, 1, 64)), jnp.float32, "want all bfloat16"),
        (((1, 128, 1, 96), (1, 128, 1, 96)), jnp.bfloat16, "H=96; a step takes 64 and 128"),
        (((1, 100, 1, 64), (1, 128, 1, 64)), jnp.bfloat16, "T=100 is not a multiple"),
        (((1, 128, 1, 64), (1, 100, 1, 64)), jnp.bfloat16, "S=100 is not a multiple"),
    ],
)
@pytest.mark.parametrize("name", STEPS[1:])
def test_what_does_not_fit_is_refused(name, shapes, dtype, says):
    q, k = (jnp.zeros(shape, dtype) for shape in shapes)
    with pytest.raises(ValueError, match=says):
        step(name)(q, k, k)


def test_each_step_asks_for_less_than_the_one_before():
    accounts = [account(name, 4, 4096, 4096, 16, 128) for name in STEPS]
    asked = [a.asked for a in accounts]
    assert asked == sorted(asked, reverse=True) and len({a.flops for a in accounts}) == 1
    assert accounts[0].scratch == 4 * 16 * 6 * 4096**2 and accounts[2].scratch == 0
    # Standard attention's account is what XLA itself counts, but for the softmax's own passes.
    q, k, v = (jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16) for _ in range(3))
    analysis = jax.jit(step("standard")).lower(q, k, v).compile().cost_analysis()
    assert analysis["flops"] == pytest.approx(
        account("standard", 1, 256, 256, 2, 64).flops, rel=0.1
    )
