"""The product behind one function: options, gradients, batching and refusals, on XLA's path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Epilogue, matmul
from pallas_kernels.matmul import ACTIVATIONS, interleave, supported
from pallas_kernels.matmul.epilogue import activate

RNG = np.random.default_rng(0)


def draw(*shape, dtype=np.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def plain(a, b, epilogue=None, transpose_a=False, transpose_b=False):
    """The definition, one line a term."""
    epilogue = epilogue or Epilogue()
    a = jnp.swapaxes(a, -1, -2) if transpose_a else a
    b = jnp.swapaxes(b, -1, -2) if transpose_b else b
    z = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    z = z if epilogue.scale is None else z * epilogue.scale
    z = z if epilogue.bias is None else z + epilogue.bias
    z = activate(z, epilogue.activation)
    return z if epilogue.residual is None else z + epilogue.residual.astype(jnp.float32)


def close(found, wanted, tolerance=1e-5):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


def operands(transpose_a, transpose_b, M=24, N=128, K=40, batch=()):
    a = draw(*batch, *((K, M) if transpose_a else (M, K)))
    return a, draw(*((N, K) if transpose_b else (K, N)))


@pytest.mark.parametrize(
    ("activation", "transpose_a", "transpose_b"),
    [
        *((activation, False, False) for activation in (None, *sorted(ACTIVATIONS), "swiglu")),
        *(("swiglu", a, b) for a, b in ((False, True), (True, False), (True, True))),
    ],
)
def test_value_and_gradients_are_those_of_the_definition(activation, transpose_a, transpose_b):
    a, b = operands(transpose_a, transpose_b)
    n = 64 if activation == "swiglu" else 128
    weight = draw(24, n)

    def value(run, a, b, scale, bias, residual):
        epilogue = Epilogue(scale, bias, activation, residual)
        out = run(a, b, epilogue=epilogue, transpose_a=transpose_a, transpose_b=transpose_b)
        return jnp.sum(out * weight), out

    arguments = (a, b, jnp.float32(0.3), draw(128), draw(24, n))
    run = lambda f: jax.value_and_grad(  # noqa: E731
        lambda *x: value(f, *x), argnums=range(5), has_aux=True
    )(*arguments)
    precise = lambda *x, **options: matmul(*x, precision="highest", **options)  # noqa: E731
    found, wanted = run(precise), run(plain)
    jax.tree.map(close, found, wanted)


def test_a_scale_of_zero_has_a_gradient():
    a, b = operands(False, False)
    slope = jax.grad(lambda s: jnp.sum(matmul(a, b, epilogue=Epilogue(scale=s))))(jnp.float32(0))
    close(slope, jnp.sum(plain(a, b)), 1e-4)


def test_a_batch_with_one_weight_or_many():
    a, b = draw(2, 3, 8, 16), draw(16, 32)
    many = draw(2, 3, 16, 32)
    close(matmul(a, b, precision="highest"), plain(a, b))
    close(matmul(a, many, precision="highest"), plain(a, many))
    flipped = jnp.swapaxes(a, -1, -2)
    close(matmul(flipped, b, transpose_a=True, precision="highest"), plain(a, b))
    slope = jax.grad(lambda b: jnp.sum(matmul(flipped, b, transpose_a=True) ** 2))(b)
    close(slope, jax.grad(lambda b: jnp.sum(plain(a, b) ** 2))(b), 1e-4)


@pytest.mark.parametrize("mapped", ["abr", "a", "b", "r", "br"])
def test_vmap_of_any_operands_and_of_the_gradient(mapped):
    a, b, residual = draw(4, 8, 16), draw(4, 16, 32), draw(4, 8, 32)
    pick = lambda x, name: x if name in mapped else x[0]  # noqa: E731
    arguments = (pick(a, "a"), pick(b, "b"), pick(residual, "r"))
    axes = tuple(0 if name in mapped else None for name in "abr")

    def run(f):
        one = lambda a, b, r: f(a, b, epilogue=Epilogue(bias=b[0], residual=r))  # noqa: E731
        slopes = jax.grad(lambda *x: jnp.sum(one(*x) ** 2), argnums=(0, 1, 2))
        out = jax.vmap(one, axes)(*arguments)
        return out, jax.vmap(slopes, axes)(*arguments)

    jax.tree.map(lambda x, y: close(x, y, 1e-4), run(matmul), run(plain))


def test_interleave_makes_the_pairs_that_swiglu_reads():
    x, gate, up = draw(8, 16), draw(16, 128), draw(16, 128)
    found = matmul(
        x, interleave(gate, up), epilogue=Epilogue(activation="swiglu"), precision="highest"
    )
    close(found, jax.nn.silu(plain(x, gate)) * plain(x, up))
    with pytest.raises(ValueError, match=r"F a multiple of 64"):
        interleave(gate[:, :60], up[:, :60])


def test_sixteen_bits_are_rounded_once():
    a, b = draw(64, 512, dtype=jnp.bfloat16), draw(512, 64, dtype=jnp.bfloat16)
    bias = 100 * draw(64)
    found = matmul(a, b, epilogue=Epilogue(bias=bias))
    assert found.dtype == jnp.bfloat16
    wanted = plain(a, b, Epilogue(bias=bias)).astype(jnp.bfloat16)
    assert np.mean(np.asarray(found) != np.asarray(wanted)) < 0.01  # sums in another order


@pytest.mark.parametrize(
    ("a", "b", "options", "says"),
    [
        ((4, 8), (9, 4), {}, r"a\(4, 8\) has K=8 and b\(9, 4\) has K=9"),
        ((4, 8), (8, 4), {"transpose_b": True}, r"has K=4 .*transpose_b=True"),
        ((8,), (8, 4), {}, r"want \[\*batch, M, K\]"),
        ((2, 4, 8), (3, 8, 4), {}, r"want \[\*batch, M, K\]"),
        ((0, 8), (8, 4), {}, "must not be empty"),
        ((4, 8), (8, 60), {"activation": "swiglu"}, "swiglu wants pairs of 64"),
        ((4, 8), (8, 4), {"bias": (5,)}, r"bias\(5,\); want \(4,\)"),
        ((4, 8), (8, 4), {"residual": (4, 5)}, r"residual\(4, 5\); want \(4, 4\)"),
        (
            (4, 8),
            (8, 4),
            {"implementation": "cutlass"},
            "there are mosaic_gpu, mosaic_tpu, triton, xla",
        ),
        ((4, 8), (8, 4), {"implementation": "mosaic_gpu"}, "arrays are on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(a, b, options, says):
    fields = {k: v for k, v in options.items() if k in ("activation", "bias", "residual")}
    epilogue = Epilogue(
        **{k: jnp.zeros(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    )
    others = {k: v for k, v in options.items() if k not in fields}
    with pytest.raises(ValueError, match=says):
        matmul(jnp.zeros(a), jnp.zeros(b), epilogue=epilogue, **others)


def test_dtypes_are_checked():
    with pytest.raises(ValueError, match="want one floating-point dtype"):
        matmul(jnp.zeros((4, 8)), jnp.zeros((8, 4), jnp.bfloat16))
    with pytest.raises(ValueError, match="there are gelu, relu, silu, swiglu"):
        Epilogue(activation="tanh")
    assert "not float32" in supported("mosaic_gpu", jnp.float32, platform="gpu")
    assert supported("mosaic_gpu", jnp.bfloat16, platform="gpu") is None
