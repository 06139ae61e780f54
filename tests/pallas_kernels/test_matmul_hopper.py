"""The Hopper kernel of `matmul`, interpreted with the race detector, and lowered for the chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Epilogue, matmul
from pallas_kernels.interpreter import WHOLE, interpret
from pallas_kernels.matmul import configs, mosaic_gpu
from pallas_kernels.matmul.mosaic_gpu import Config

newer = pytest.mark.skipif(not WHOLE, reason="jax 0.10 interprets less; a newer one does this")
TOGETHER = Config(128, 128, slots=2)
PING_PONG = Config(128, 128, slots=3, ping_pong=True)


def draw(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(len(shape) + shape[0]).normal(size=shape), dtype)


def held(a, b, epilogue=None, **options):
    """The interpreted kernel's result is XLA's, in as many bits as a dtype has."""
    found = interpret(matmul, a, b, epilogue=epilogue, **options)
    wanted = matmul(
        a, b, epilogue=epilogue, implementation="xla",
        **{k: v for k, v in options.items() if k != "config"},
    )  # fmt: skip
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    step = 2.0 ** (-7 if a.dtype == jnp.bfloat16 else -10)
    np.testing.assert_allclose(found, wanted, rtol=step, atol=step * np.abs(wanted).max() / 16)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(TOGETHER, jnp.bfloat16), (PING_PONG, jnp.bfloat16), (PING_PONG, jnp.float16)],
)
def test_more_tiles_than_blocks_and_more_steps_than_slots(config, dtype):
    held(draw(384, 320, dtype=dtype), draw(320, 384, dtype=dtype), config=config)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_both_layouts_of_each_operand(transpose_a, transpose_b):
    if not WHOLE and (transpose_a or transpose_b):
        pytest.skip("jax 0.10 interprets no transposed reference")
    a, b = draw(*((192, 128) if transpose_a else (128, 192))), draw(192, 128)
    b = b.T if transpose_b else b
    held(a, b, transpose_a=transpose_a, transpose_b=transpose_b, config=TOGETHER)


@pytest.mark.parametrize("config", [TOGETHER, PING_PONG])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_whole_epilogue(config, activation):
    n = 64 if activation == "swiglu" else 128
    epilogue = Epilogue(0.1, draw(128, dtype=jnp.float32), activation, draw(256, n))
    held(draw(256, 128), draw(128, 128), epilogue, config=config)


def test_a_batch_each_with_its_own_matrix():
    held(draw(3, 128, 64), draw(3, 64, 128), config=TOGETHER)


@newer
@pytest.mark.parametrize("config", [TOGETHER, PING_PONG])
def test_edges_that_no_tile_fits(config):
    held(draw(136, 192), draw(192, 320), Epilogue(bias=draw(320, dtype=jnp.float32)), config=config)


@newer
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (130, 70, 65), (3, 200, 72)])
def test_shapes_that_are_padded_inside(M, N, K):
    held(draw(M, K), draw(K, N), config=TOGETHER)


@newer
@pytest.mark.parametrize(
    "config",
    [
        Config(128, 128, slots=2, cluster=2),
        Config(128, 128, slots=3, cluster=2, beside=True, ping_pong=True),
        Config(64, 32, 128, slots=3, cluster=4, beside=True, ping_pong=True),
    ],
)
def test_clusters_that_share_their_copies(config):
    held(draw(256, 256), draw(256, 256), config=config)


def slopes(a, b, *, interpret=False):
    """Gradients of a product of each of a's matrices with b, by way of vmap."""
    options = {"interpret": interpret} if interpret else {"implementation": "xla"}
    one = lambda a, b: matmul(a, b, epilogue=Epilogue(activation="gelu"), **options)  # noqa: E731
    total = lambda a, b: jnp.sum(jax.vmap(one, (0, None))(a, b).astype(jnp.float32) ** 2)  # noqa: E731
    return jax.grad(total, argnums=(0, 1))(a, b)


@newer
def test_gradients_through_vmap_run_the_kernel():
    a, b = draw(2, 64, 64), draw(64, 128)
    for found, wanted in zip(interpret(slopes, a, b), slopes(a, b), strict=True):
        found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
        assert np.abs(found - wanted).max() <= 0.01 * np.abs(wanted).max()


M, N, K = 4096, 2048, 1024
OPTIONS = {
    "gelu, residual": {"activation": "gelu", "residual": (1, M, N)},
    "plain": {},
    "scale, bias": {"scale": (1, 1), "bias": (1, N)},
    "swiglu": {"activation": "swiglu"},
    "transposed": {"transpose_a": True, "transpose_b": True},
}


@pytest.mark.parametrize("config", [*(c for c, *_ in configs.CANDIDATES), configs.OF_FEW_ROWS])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_schedule_lowers_for_the_chip(name, dtype, config):
    options = dict(OPTIONS[name])
    if name == "swiglu" and config.tile_n % 128:
        pytest.skip("a tile of this schedule holds no pairs")
    flip = (lambda *shape: shape[::-1]) if name == "transposed" else (lambda *shape: shape)
    shapes = {"a": (1, *flip(M, K)), "b": (1, *flip(K, N))}
    shapes |= {k: options.pop(k) for k in ("scale", "bias", "residual") if k in options}
    arrays = {
        k: jax.ShapeDtypeStruct(shape, jnp.float32 if k in ("scale", "bias") else dtype)
        for k, shape in shapes.items()
    }
    run = jax.jit(lambda arrays: mosaic_gpu.matmul(**arrays, config=config, **options))
    lowered = run.trace(arrays).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert config.shared_memory <= mosaic_gpu.SHARED_MEMORY - 1024  # barriers need some


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((4096, 4096, 4096), "together"),
        ((8192, 3072, 1024), "in turns"),  # short: the epilogue must overlap
        ((1000, 10048, 3008), "in turns"),  # smaller tiles waste less of the last wave
        ((64, 4096, 4096), "few rows"),
    ],
)
def test_the_schedule_follows_the_shape(shape, wanted):
    config = configs.choose(*shape, batch=1, blocks=132, pairs=False)
    kind = "in turns" if config.ping_pong else "together"
    assert ("few rows" if config.tile_m == 64 else kind) == wanted
    paired = configs.choose(*shape, batch=1, blocks=132, pairs=True)
    assert paired.tile_n % 128 == 0
