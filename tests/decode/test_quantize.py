"""Matrices in 8 and 4 bits: their values bit for bit, their products, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.quantize import Scheme, gptq, round_to_nearest
from decode.quantize.calibrate import Inputs
from decode.quantize.weights import default_group
from jaxinfra.errors import UserError
from jaxinfra.model import quantized
from jaxinfra.model.cache import project
from pallas_kernels.quantised_matmul import formats
from tests.decode.quantize_cases import meant, normal, rounded

SCHEMES = [Scheme(8), Scheme(8, 16), Scheme(4, 16), Scheme(4), Scheme(8, float8=True)]
OUT, IN = 24, 64


def heavy(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal weights, a row of zeros and one input a hundred times as large as the others."""
    w = normal(*shape, seed=seed)
    w[3] = 0
    w[:, 5] *= 100
    return w


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_is_numpys_bit_for_bit(scheme):
    w = heavy(OUT, IN)
    found = round_to_nearest(jnp.asarray(w), scheme, (IN, OUT))
    expected = rounded(w, scheme)
    np.testing.assert_array_equal(meant(found), expected)
    np.testing.assert_array_equal(np.asarray(quantized.dequantize(found)), expected)
    array = np.asarray(quantized.dense({"w": found}, jnp.float32)["w"])
    np.testing.assert_array_equal(array, expected.T)
    assert found.inputs == IN


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=str)
def test_no_weight_is_off_by_more_than_the_definition_says(scheme):
    """Half a step, and the largest by what the scale lost on its way to bfloat16."""
    w = heavy(OUT, IN)
    found = round_to_nearest(jnp.asarray(w), scheme, (IN, OUT))
    steps = np.repeat(np.asarray(found.scales).T, IN // found.scales.shape[0], axis=1)
    lost = {8: 127.5, 4: 7.5}[scheme.bits] / 2**8  # bfloat16 has eight bits
    assert (np.abs(meant(found) - w) <= steps * (0.501 + lost)).all()


@pytest.mark.parametrize("wrong", ["nibbles swapped", "scale of the next group", "not shifted"])
def test_a_wrong_layout_is_told(wrong):
    w = normal(OUT, IN)
    right = round_to_nearest(jnp.asarray(w), Scheme(4, 16), (IN, OUT))
    if wrong == "nibbles swapped":
        broken = dataclasses.replace(right, values=right.values << 4 | right.values >> 4)
    elif wrong == "not shifted":
        broken = dataclasses.replace(right, values=right.values ^ 0x88)
    else:
        broken = dataclasses.replace(right, scales=jnp.roll(right.scales, 1, axis=0))
    expected = rounded(w, Scheme(4, 16))
    assert not np.array_equal(np.asarray(quantized.dequantize(broken)), expected)
    assert np.abs(meant(broken) - expected).max() > 0.05


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda v: len(v) % 2 == 0))
@settings(max_examples=10, deadline=None)
def test_packing_loses_nothing(values):
    whole = np.asarray([values, values[::-1]], np.int8)
    packed = formats.pack(jnp.asarray(whole))
    assert packed.shape == (2, len(values) // 2)
    assert int(packed[0, 0]) == (values[0] + 8) + 16 * (values[1] + 8)  # the earlier one low
    np.testing.assert_array_equal(np.asarray(formats.unpack(packed)), whole)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_product_is_that_of_the_dequantised_matrix(scheme, rows):
    w = round_to_nearest(jnp.asarray(normal(OUT, IN)), scheme, (IN, OUT))
    x = normal(1, rows, IN, seed=1) * 3
    expected = x @ rounded(normal(OUT, IN), scheme).T
    found = np.asarray(project(jnp.asarray(x), quantized.for_decoding(w)))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    half = project(jnp.asarray(x, jnp.bfloat16), w)
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - expected).max() < 2e-2 * np.abs(expected).max()
    assert project(jnp.asarray(x, jnp.bfloat16), w, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_product_of_a_gpu_gives_the_same(scheme, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    w = round_to_nearest(jnp.asarray(normal(OUT, IN)), scheme, (IN, OUT))
    assert quantized.for_decoding(w) is w  # packed values stay packed
    x = normal(1, 1, IN, seed=1)
    expected = x @ rounded(normal(OUT, IN), scheme).T
    found = np.asarray(project(jnp.asarray(x), w))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_rows_do_not_depend_on_each_other():
    w = round_to_nearest(jnp.asarray(normal(OUT, IN)), Scheme(8), (IN, OUT))
    x = normal(1, 6, IN, seed=2)
    together = np.asarray(project(jnp.asarray(x), w))
    for r in range(6):
        other = x * 1e3
        other[0, r] = x[0, r]
        np.testing.assert_array_equal(
            np.asarray(project(jnp.asarray(other), w))[0, r], together[0, r]
        )


def test_matrices_join_at_their_outputs():
    parts = [normal(8, IN, seed=s) for s in range(3)]
    each = [round_to_nearest(jnp.asarray(w), Scheme(4, 16), (IN, 2, 4)) for w in parts]
    whole = quantized.concatenate(each)
    expected = np.concatenate([rounded(w, Scheme(4, 16)) for w in parts])
    np.testing.assert_array_equal(meant(whole), expected)


def by_elimination(w: np.ndarray, gram: np.ndarray, scheme: Scheme, sign: float = 1.0):
    """GPTQ as section 3 of the paper derives it, float64: after each column the inverse shrinks."""
    w = w.astype(np.float64)
    inverse = np.linalg.inv(gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram)))
    out = np.zeros_like(w)
    width = scheme.group or w.shape[1]
    whole = w.astype(np.float32)
    for j in range(w.shape[1]):
        if j % width == 0:
            group = (w if scheme.group else whole)[:, j : j + width].astype(np.float32)
            scale = meant_scale(group, scheme)
        half = 1 << scheme.bits - 1
        out[:, j] = np.clip(np.rint(w[:, j] / scale), -half, half - 1) * scale
        error = (w[:, j] - out[:, j]) / inverse[j, j]
        w[:, j + 1 :] -= sign * error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


def meant_scale(group: np.ndarray, scheme: Scheme) -> np.ndarray:
    most = np.float32(1 / ((1 << scheme.bits - 1) - 0.5))
    return np.asarray(
        jnp.asarray(np.abs(group).max(axis=1) * most).astype(jnp.bfloat16), np.float64
    )


def inputs(seed: int = 3) -> tuple[np.ndarray, Inputs]:
    """Inputs that go together, and what calibration keeps of them."""
    x = normal(256, IN, seed=seed) @ (
        np.eye(IN, dtype=np.float32) + 0.3 * normal(IN, IN, seed=9) / 4
    )
    return x, Inputs(jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).sum(axis=0)))


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(4), Scheme(8)], ids=str)
def test_gptq_is_the_papers(scheme):
    x, kept = inputs()
    w = normal(OUT, IN)
    found = meant(gptq.quantize(jnp.asarray(w), kept, scheme, (IN, OUT)))
    expected = by_elimination(w, x.T @ x, scheme)
    assert np.mean(found != expected.astype(np.float32)) < 0.02  # where float32 rounds a tie over

    def error(q: np.ndarray) -> float:
        return float(np.square(x @ (q - w).T).sum())

    assert error(found) == pytest.approx(error(expected), rel=0.02)
    assert error(found) < 0.75 * error(rounded(w, scheme))
    wrong = by_elimination(w, x.T @ x, scheme, sign=-1.0)
    assert error(wrong) > 1.2 * error(rounded(w, scheme))


def test_gptq_lives_with_inputs_that_are_never_there():
    x, kept = inputs()
    x[:, [2, 7]] = 0
    gram = jnp.asarray(x.T @ x)
    found = gptq.quantize(
        jnp.asarray(normal(OUT, IN)), Inputs(gram, kept.magnitude), Scheme(4, 16), ()
    )
    assert np.isfinite(np.asarray(found.scales)).all()
    with pytest.raises(UserError, match="not finite"):
        gptq.quantize(jnp.asarray(normal(OUT, IN)), Inputs(gram * jnp.nan, gram[0]), Scheme(8), ())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Scheme(3), "bits=3; give 8 or 4"),
        (lambda: Scheme(4, 16, float8=True), "float8 has 8 bits"),
        (lambda: Scheme(8, 128, float8=True), "leave out group"),
        (lambda: Scheme(4, 0), "group=0"),
        (lambda: Scheme(4, 7), "group=7; give an even number"),
        (lambda: Scheme(4, 128).width(576), "group=128 does not divide the 576 .* such as 64, 32"),
        (lambda: Scheme(4).width(60), "multiple of 8"),
        (lambda: Scheme(8).width(62), "multiple of 4"),
    ],
)
def test_what_cannot_be_is_refused(build, words):
    with pytest.raises(UserError, match=words):
        build()


def test_the_default_group_divides():
    assert default_group(4096, 14_336) == 128
    assert default_group(576, 576, 1536) == 64
