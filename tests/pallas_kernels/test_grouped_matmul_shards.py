"""The grouped product inside `shard_map`: how its kernels' arrays are typed, and their gradients.

The interpreter knows one device. Here plain products take the kernels' place, typed as kernels are:
as if they were equal on all devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import config
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import grouped_matmul, shards
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_gpu_wgrad, product, xla

COUNTS = [[5, 0, 20], [32, 0, 0], [3, 9, 11], [0, 0, 0]][: jax.device_count()]  # of each device
DEVICES, M, K, N = len(COUNTS), 32, 64, 128


def typed_as_a_kernel(plain):
    def run(*arrays, transpose_w=None, **_):
        options = {} if transpose_w is None else {"transpose_w": transpose_w}
        with config._check_vma(False):
            return plain(*arrays, **options)

    return run


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(product, "supported", lambda *_: None)
    monkeypatch.setattr(mosaic_gpu, "grouped_matmul", typed_as_a_kernel(xla.grouped_matmul))
    monkeypatch.setattr(mosaic_gpu_wgrad, "wgrad", typed_as_a_kernel(xla.wgrad))


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    counts = jnp.asarray(COUNTS, jnp.int32).reshape(-1)
    return make(DEVICES * M, K), make(len(COUNTS[0]), K, N), counts, make(DEVICES * M, N)


def on_all(implementation=None):
    """Product and gradients, rows by device and the matrices on all of them."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("dp",))
    rows, whole = P("dp"), P()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, whole, rows, rows), out_specs=(rows, rows, whole)
    )
    def run(x, w, counts, dy):
        of = functools.partial(grouped_matmul, counts=counts, implementation=implementation)
        out, pull = jax.vjp(of, x, w)
        return out, *pull(dy)

    return jax.jit(run)


def near(got, want, off=1e-4):
    pairs = zip(got, want, strict=True)
    return all(np.allclose(*np.asarray(pair, np.float32), atol=off, rtol=off) for pair in pairs)


@pytest.mark.usefixtures("kernels")
def test_gradients_of_matrices_that_all_have_are_summed():
    assert near(on_all()(*arrays()), on_all("xla")(*arrays()))


@pytest.mark.usefixtures("kernels")
def test_a_kernel_is_chosen_inside_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(product, "_grouped", lambda call, x, w, counts: asked.append(call))
    x, w, _, _ = arrays()
    grouped_matmul(x, w, jnp.asarray(COUNTS[0]))
    with pytest.raises(ValueError, match="tree structure"):  # nothing came back
        on_all()(*arrays())
    assert [call.implementation for call in asked] == ["xla", "mosaic_gpu"]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["alike", "like"])
def test_without_their_types_it_is_refused(monkeypatch, name):
    as_they_are = {"alike": lambda *of: of, "like": lambda made, _: made}
    monkeypatch.setattr(shards, name, as_they_are[name])
    with pytest.raises(ValueError, match="type"):
        on_all()(*arrays())


def test_it_lowers_with_one_sum_over_the_devices(monkeypatch):
    monkeypatch.setattr(product, "supported", lambda *_: None)
    of = [jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in arrays()]
    of[2] = jax.ShapeDtypeStruct(of[2].shape, jnp.int32)
    text = on_all().trace(*of).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 3
    assert text.count('"stablehlo.all_reduce"') == 1


@pytest.mark.skipif(
    jax.default_backend() != "gpu" or jax.device_count() < 2,
    reason="JAX_PLATFORMS=cuda with two Hopper GPUs runs the kernels themselves",
)
def test_on_gpus_of_one_host():
    given = arrays(jnp.bfloat16)
    assert near(on_all("mosaic_gpu")(*given), on_all("xla")(*given), off=0.06)
