"""Attention over pages on a TPU: interpreted against the mathematics, and compiled for real chips.

Out of bounds and scratch that nothing was written to are NaN in the interpreter, and a detector
looks for unordered accesses to memory.
"""

import functools
import importlib
from typing import Any

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import mosaic_tpu, paged_attention
from tests.pallas_kernels.paged_cases import Batch, altered
from tests.pallas_kernels.tpu_topology import CHIPS, compile_for, kernels, needs_libtpu

interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")

SHAPE: dict[str, Any] = {"N": 4, "K": 2, "H": 64, "page": 16, "M": 5}
CASES = {
    "decode, every option": {
        "rows": [(1, 9), (0, 5), (1, 70), (1, 32)],
        "options": {"soft_cap": 2.0, "window": 25, "sinks": [0.5, -1.0, 2.0, -np.inf]},
    },
    "mixed": {"rows": [(1, 9), (35, 70), (3, 3)], "N": 3, "K": 1, "spare_tokens": 2},
}  # fmt: skip


SMALL = ("ROWS, KEYS = 128, 128", "ROWS, KEYS = 64, 32")
BEGIN = "half = lax.rem(j{}, 2)\n        pl.when"
MISTAKES = {  # the mistake, a case that shows it, and what makes it
    "keys that have not arrived": ("decode, every option", "copy.wait()", "pass"),
    "the other half of the buffer": ("mixed", BEGIN.format(""), BEGIN.format(" + 1")),
    "stale page": (
        "decode, every option",
        "lax.min(j * call.pages + i",
        "lax.min(low * call.pages + i",
    ),
    "values past the end": (
        "decode, every option",
        "+ j * call.run < length",
        "+ j * call.run < length + 9",
    ),
    "no rescaling": ("mixed", "sums[head] * spread(shrink, v.shape[1])", "sums[head]"),
    "mask off by one": ("mixed", "* call.run - position)", "* call.run - position - 1)"),
    "a run left out": ("mixed", "high = lax.div(last + call.run,", "high = lax.div(last,"),
}


def run(batch, attend=None, **more):
    arrays, options = batch.arguments()
    params = pltpu.InterpretParams(detect_races=True, random_seed=1)
    attend = attend or altered(mosaic_tpu, SMALL)
    call = functools.partial(attend, interpret=params, **options, **more)
    found = jax.block_until_ready(jax.jit(call)(*arrays))
    assert not interpreter.races.races_found
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_the_mathematics(name):
    batch = Batch(**{**SHAPE, **CASES[name]})
    np.testing.assert_allclose(run(batch), batch.wanted(), atol=1e-5)


@pytest.mark.slow
def test_bfloat16():
    batch = Batch(**{**SHAPE, **CASES["mixed"], "dtype": jnp.bfloat16})
    np.testing.assert_allclose(run(batch), batch.wanted(), atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake):
    name, right, wrong = MISTAKES[mistake]
    batch = Batch(**{**SHAPE, **CASES[name]})
    attend = altered(mosaic_tpu, SMALL, (right, wrong))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(batch, attend), batch.wanted(), atol=1e-3)


@pytest.mark.slow
def test_bits_depend_on_the_row_alone():
    """Whole and alone, as a chunk among others, and one query at a time in a wider table."""
    whole, chunk, step = (
        Batch([(70, 70)], numbers=[7], **SHAPE),
        Batch([(1, 9), (14, 62)], numbers=[0, 7], seed=1, **SHAPE),
        Batch([(1, 66), (1, 70)], numbers=[1, 7], seed=2, **{**SHAPE, "M": 9}),
    )
    out = run(whole, invariant=True)
    np.testing.assert_array_equal(run(chunk, invariant=True)[1:], out[48:62])
    np.testing.assert_array_equal(run(step, invariant=True)[1], out[69])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"platform": "cpu"}, "on cpu"),
        ({"dtype": jnp.float16}, "not float16"),
        ({"pages_dtype": "int8"}, "not int8"),
        ({"H": 96}, "head width of 64, 128, 256, not 96"),
        ({"page": 48}, "not 48"),
        ({"N": 129}, "not 129"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    kinds = {"dtype": jnp.bfloat16, "pages_dtype": jnp.bfloat16}
    facts = {"platform": "tpu", "page": 16, "N": 2, "K": 1, "H": 64, **kinds}
    assert mosaic_tpu.refusal(**facts) is None
    assert says in (mosaic_tpu.refusal(**(facts | change)) or "")


def test_an_error_names_what_does_not_fit():
    arrays, options = Batch([(1, 3)], N=2, K=1, H=64, page=12).arguments()
    with pytest.raises(ValueError, match="pages of 16, 32, 64 or a multiple of 128 places, not 12"):
        mosaic_tpu.paged_attention(*arrays, **options)
    with pytest.raises(ValueError, match="arrays are on cpu"):
        paged_attention(*arrays, **options, implementation="mosaic_tpu")


EVERY = {"window": 300, "soft_cap": 30.0, "sinks": jnp.zeros(8)}
COMPILED = {  # (T, N, K, H), dtype, page, options
    "decode": ((8, 8, 2, 128), jnp.bfloat16, 16, {}),
    "decode, every option": ((8, 8, 4, 256), jnp.float32, 16, EVERY),
    "mixed": ((300, 8, 2, 128), jnp.bfloat16, 32, EVERY),
    "64 wide, three heads a key head": ((8, 9, 3, 64), jnp.bfloat16, 16, {}),
    "large pages, many heads": ((300, 32, 8, 128), jnp.bfloat16, 256, {}),
}


@needs_libtpu
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("chip", CHIPS)
def test_it_compiles_for_the_chip(chip, name):
    (T, N, K, H), dtype, page, options = COMPILED[name]
    shape, whole = jax.ShapeDtypeStruct, jnp.int32
    pages = shape((100, K, page, H), dtype)

    def attend(*arrays):
        return mosaic_tpu.paged_attention(*arrays, scale=0.1, **options)

    compiled = compile_for(
        chip, attend, shape((T, N, H), dtype), pages, pages, shape((8, 64), whole),
        shape((9,), whole), shape((8,), whole),
    )  # fmt: skip
    assert kernels(compiled) == 1
