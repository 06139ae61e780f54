"""Every step of the ladder, interpreted with the race detector on, and lowered for the chip."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.interpreter import WHOLE, RaceError, interpret
from pallas_kernels.matmul import reference
from pallas_kernels.matmul.ladder import STEPS, broken

SHAPES = {  # more tiles than blocks, where blocks make several; more steps than slots
    "persistent": (384, 512, 320),
    "multicast": (512, 512, 320),
    "ping_pong": (384, 384, 256),
}
newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")


def step(name):
    return importlib.import_module(f"pallas_kernels.matmul.ladder.{name}").matmul


def inputs(M, N, K, dtype):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return make(M, K), make(K, N)


def error(found, a, b):
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    return np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(n, jnp.bfloat16, marks=newer if n == "multicast" else ()) for n in STEPS),
        ("ping_pong", jnp.float16),
    ],
)
def test_a_step_gives_the_product_and_does_not_race(name, dtype):
    a, b = inputs(*SHAPES.get(name, (256, 256, 320)), dtype)
    found = interpret(step(name), a, b)
    assert found.dtype == dtype
    assert error(found, a, b) <= 1.01 * error(reference.matmul(a, b), a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_lowers_for_the_chip(name, dtype):
    a, b = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((4096, 2048), (2048, 1024)))
    lowered = jax.jit(step(name)).trace(a, b).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_a_ring_without_mistakes_passes():
    a, b = inputs(64, 64, 320, jnp.bfloat16)
    found = interpret(broken.matmul, a, b)
    assert error(found, a, b) <= 1.01 * error(reference.matmul(a, b), a, b)


@pytest.mark.parametrize(
    "mistake",
    [
        "multiplies early",
        "releases early",
        pytest.param("copies early", marks=newer),
        pytest.param("stores early", marks=newer),
    ],
)
def test_every_mistake_is_found(mistake):
    assert mistake in broken.MISTAKES
    a, b = inputs(64, 64, 320, jnp.bfloat16)
    with pytest.raises(RaceError, match=r"broken\.matmul races"):
        interpret(broken.matmul, a, b, mistake=mistake)
    test_a_ring_without_mistakes_passes()  # and nothing is left behind


@pytest.mark.parametrize(
    ("a", "b", "dtype", "says"),
    [
        ((128, 64), (128, 256), jnp.bfloat16, r"a\(128, 64\) and b\(128, 256\); want"),
        ((256, 64), (64, 250), jnp.bfloat16, "N=250 is not a multiple of"),
        ((100, 64), (64, 256), jnp.bfloat16, "M=100 is not a multiple of"),
        ((256, 70), (70, 256), jnp.bfloat16, "K=70 is not a multiple of 64"),
        ((256, 64), (64, 256), jnp.float32, "float32 and float32; want both"),
    ],
)
@pytest.mark.parametrize("name", STEPS)
def test_what_does_not_fit_is_refused(name, a, b, dtype, says):
    with pytest.raises(ValueError, match=says):
        step(name)(jnp.zeros(a, dtype), jnp.zeros(b, dtype))
