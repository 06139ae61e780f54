"""Rings against XLA's collectives, forward and transposed, and their messages against the count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import UserError
from parallel import collectives as C
from parallel.census import census
from parallel.collective_matmul import all_gather_matmul, matmul_reduce_scatter
from parallel.mesh import ensure_varying
from tests.parallel.emulated import RING, over_ring, relative

X = np.random.default_rng(0).normal(size=(RING * RING, 6)).astype(np.float32)  # 8 rows a device


def xla_broadcast(x, axis, root):
    return lax.psum(jnp.where(lax.axis_index(axis) == root, x, jnp.zeros_like(x)), axis)


RINGS = {
    "all_gather": (C.all_gather, functools.partial(lax.all_gather, tiled=True)),
    "all_reduce": (C.all_reduce, lax.psum),
    "all_to_all": (
        C.all_to_all,
        functools.partial(lax.all_to_all, split_axis=0, concat_axis=0, tiled=True),
    ),
    "broadcast": (functools.partial(C.broadcast, root=3), functools.partial(xla_broadcast, root=3)),
    "reduce_scatter": (C.reduce_scatter, functools.partial(lax.psum_scatter, tiled=True)),
}


def with_gradient(collective):
    """Its result and the gradient of a weighted sum of it, on every device."""

    def local(x):
        x = ensure_varying(x, ("tp",))

        def loss(x):
            y = ensure_varying(collective(x, "tp"), ("tp",))
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))), y

        (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return y, gradient

    return over_ring(local)


@functools.cache
def expected(name):
    return with_gradient(RINGS[name][1])(X)


@pytest.mark.parametrize("name", sorted(RINGS))
def test_ring_equals_xla(name):
    assert relative(with_gradient(RINGS[name][0])(X), expected(name)) < 1e-6


@pytest.mark.parametrize("name", ["all_gather", "all_reduce", "reduce_scatter"])
def test_two_directions_equal_xla(name):
    both = functools.partial(C.both_ways, RINGS[name][0])
    assert relative(with_gradient(both)(X), expected(name)) < 1e-6


def parts_in_wrong_places(x, axis):
    """A reduce-scatter that starts each part at home: device i ends with part i + 1."""
    n, i = lax.axis_size(axis), lax.axis_index(axis)
    parts = x.reshape(n, -1, *x.shape[1:])
    total = parts[i]
    for step in range(1, n):
        total = C._shift(total, axis, 1) + parts[(i - step) % n]
    return total


def one_step_short(x, axis):
    """An all-gather that leaves out the last message."""
    whole = C.all_gather(x, axis).reshape(lax.axis_size(axis), *x.shape)
    return whole.at[(lax.axis_index(axis) + 1) % 8].set(0).reshape(-1, x.shape[1])


def summed_twice(x, axis):
    """An all-reduce of what is already reduced."""
    return C.all_reduce(C.all_reduce(x, axis), axis)


WRONG = {
    "all_gather": one_step_short,
    "all_reduce": summed_twice,
    "reduce_scatter": parts_in_wrong_places,
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_rings_are_rejected(name):
    assert relative(with_gradient(WRONG[name])(X), expected(name)) > 0.1


def test_two_directions_send_two_halves():
    """As many bytes in twice the messages, of which two are under way at a time."""
    both = functools.partial(C.both_ways, C.all_reduce)
    found = census(over_ring(lambda x: both(x, "tp")).lower(X).compile())
    cost = C.cost("all_reduce", RING, X.nbytes // RING)
    assert len(found) == 2 * cost.steps and sum(c.sent for c in found) == cost.bytes


@pytest.mark.parametrize("name", sorted(RINGS))
def test_messages_are_those_counted(name):
    found = census(over_ring(lambda x: RINGS[name][0](x, "tp")).lower(X).compile())
    local = X.nbytes // RING
    cost = C.cost(name, RING, local * RING if name == "all_gather" else local)
    assert {c.op for c in found} == {"collective-permute"}
    assert len(found) == cost.steps
    assert sum(c.sent for c in found) == cost.bytes
    if name == "all_reduce":
        assert cost.bytes == 2 * (RING - 1) * local // RING


def test_rows_that_do_not_divide_are_told():
    with pytest.raises(UserError, match="pad them"):
        over_ring(lambda x: C.reduce_scatter(x, "tp")).lower(X[: RING * 3])
    with pytest.raises(UserError, match="no two halves"):
        over_ring(lambda x: C.both_ways(C.all_reduce, x, "tp")).lower(X[:, :5])


MATMULS = {
    "all_gather_matmul": (
        all_gather_matmul,
        lambda x, w, axis: lax.all_gather(x, axis, tiled=True) @ w,
        (P("tp", None), P(None, "tp"), P(None, "tp")),
    ),
    "matmul_reduce_scatter": (
        matmul_reduce_scatter,
        lambda x, w, axis: lax.psum_scatter(x @ w, axis, tiled=True),
        (P(None, "tp"), P("tp", None), P("tp", None)),
    ),
}


@pytest.mark.parametrize("name", sorted(MATMULS))
def test_collective_matmul_equals_the_plain_pair(name):
    ours, plain, (x_spec, w_spec, y_spec) = MATMULS[name]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(32, 16)).astype(np.float32)
    w = rng.normal(size=(16, 24)).astype(np.float32)

    def program(product):
        def local(x, w):
            def loss(x, w):
                y = product(x, w, "tp")
                return jnp.sum(jnp.sin(y)), y

            gradients, y = jax.grad(loss, (0, 1), has_aux=True)(x, w)
            return y, gradients

        return over_ring(local, ins=(x_spec, w_spec), out=(y_spec, (x_spec, w_spec)))

    assert relative(program(ours)(x, w), program(plain)(x, w)) < 1e-5
    forward = over_ring(lambda x, w: ours(x, w, "tp"), ins=(x_spec, w_spec), out=y_spec)
    found = census(forward.lower(x, w).compile())
    assert [c.op for c in found] == ["collective-permute"] * (RING - 1)
