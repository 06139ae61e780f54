"""Context parallelism against one device: packed documents that cross devices, every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import UserError
from pallas_kernels.flash_attention import attention
from parallel import context, model
from parallel import mesh as M
from parallel.census import census, totals
from parallel.mesh import Axis
from tests.parallel import tiny
from tests.parallel.emulated import cases, relative
from tests.parallel.runs import differences, trained

B, T, N, K, H, CP = 2, 32, 8, 4, 6, 4


def heads(method):
    """Two key heads on four devices leave groups of two to the product; all four otherwise."""
    return K // 2 if method == "usp" else K


@functools.cache
def inputs(packed, K=K):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, h, H)).astype(np.float32) for h in (N, K, K))
    ids = np.repeat(np.arange(1, 5), [3, 17, 2, 10])[None].repeat(B, 0).astype(np.int32)
    ids[1, 20:] = 0
    return q, k, v, ids if packed else None


def loss(attend, q, k, v, ids):
    out = attend(q, k, v, ids)
    return jnp.sum(jnp.sin(out) * jnp.arange(out.size, dtype=out.dtype).reshape(out.shape) / 100)


@functools.cache
def expected(packed, K=K):
    q, k, v, ids = inputs(packed, K)
    plain = lambda q, k, v, ids: attention(q, k, v, causal=True, segment_ids=ids)  # noqa: E731
    gradients = jax.grad(functools.partial(loss, plain), (0, 1, 2))
    both = lambda *inputs: (plain(*inputs), gradients(*inputs))  # noqa: E731
    return jax.jit(both)(q, k, v, ids)


def cut(method, packed, order=None):
    """Output and gradients of a method over four devices, in the order of positions."""
    mesh = M.make({Axis.CP: CP})
    order = context.zigzag(T, CP) if order is None else order
    back = np.argsort(order)

    def whole(q, k, v, ids):
        seen = [x if x is None else x[:, order] for x in (q, k, v, ids)]
        local = functools.partial(context.attend, scale=H**-0.5, method=method)
        specs = (P(None, "cp"),) * 3 + (None if ids is None else P(None, "cp"),)
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None, "cp"))
        return mapped(*seen)[:, back]

    def both(q, k, v, ids):
        return whole(q, k, v, ids), jax.grad(functools.partial(loss, whole), (0, 1, 2))(
            q, k, v, ids
        )

    return jax.jit(both)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", sorted(context.METHODS))
def test_attention_equals_one_device(method, packed):
    found = cut(method, packed)(*inputs(packed, heads(method)))
    assert relative(found, expected(packed, heads(method))) < 1e-5


def test_a_wrong_order_is_rejected():
    contiguous = np.arange(T)
    for method in ("gather", "ring", "usp"):
        found = cut(method, False, contiguous)(*inputs(False, heads(method)))
        assert relative(found, expected(False, heads(method))) > 0.1


def test_a_wrong_merge_is_rejected(monkeypatch):
    def mean(a, b):
        out = jnp.where(jnp.isfinite(a[1])[..., None], (a[0] + b[0]) / 2, b[0])
        return out, jnp.maximum(a[1], b[1])

    monkeypatch.setattr(context, "_merge", mean)
    assert relative(cut("ring", False)(*inputs(False)), expected(False)) > 0.1


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_zigzag_shares_out_the_work(n):
    chunks = context.zigzag(2 * n, n).reshape(n, 2)
    pairs = [sum(int(c) + 1 for c in own) for own in chunks]  # of a chunk with those up to itself
    assert pairs == [2 * n + 1] * n
    assert sorted(chunks.reshape(-1)) == list(range(2 * n))


def test_what_each_method_sends():
    """Forward, in bytes a device: keys and values of the others; or a share of everything."""
    sent = {}
    for method in sorted(context.METHODS):
        q, k, v, _ = inputs(False, heads(method))
        mesh = M.make({Axis.CP: CP})
        local = functools.partial(context.attend, segments=None, scale=1.0, method=method)
        spec = P(None, "cp")
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
        found = census(jax.jit(mapped).lower(q, k, v).compile())
        sent[method] = sum(c.sent for c in found)
        if method == "ring":
            assert {c.executed for c in found} == {CP - 1}
            assert totals(found)["collective-permute"][1] == sent["ring"]
    q, k, v, _ = inputs(False)
    keys = (CP - 1) * (k.nbytes + v.nbytes) // CP
    assert sent["gather"] == keys
    assert sent["ring"] == keys
    assert sent["ulysses"] == (CP - 1) * (2 * q.nbytes + k.nbytes + v.nbytes) // CP**2
    u, r = 2, 2
    heads_swapped = (
        (u - 1) * (2 * q.nbytes + k.nbytes) // (u * CP)
    )  # half the keys, half the values
    assert sent["usp"] == heads_swapped + (r - 1) * k.nbytes // CP


CASES = {
    "ring": ("qwen3", "cp=4", "dp", {}),
    "ring, fsdp, tp": ("llama", "fsdp=2,cp=2,tp=2", "zero3", {}),
    "gather, dp": ("llama", "dp=2,cp=4", "zero2", {"context": "gather"}),
    "usp, tp": ("llama", "cp=4,tp=2", "dp", {"context": "usp"}),
    "ulysses, tp": ("qwen3", "cp=2,tp=2", "dp", {"context": "ulysses"}),
    "ulysses, pp, dp": (
        "qwen3",
        "pp=2,dp=2,cp=2",
        "dp",
        {"schedule": "1f1b", "accumulate": 2, "context": "ulysses"},
    ),
}


DEFAULT = {"ring, fsdp, tp", "ulysses, tp"}


@pytest.mark.parametrize("case", cases(CASES, DEFAULT))
def test_training_equals_one_device(case):
    name, mesh, builder, options = CASES[case]
    found = differences(trained(name, mesh, builder, **options), tiny.one_device(name))
    assert max(found.values()) < 1e-5, found


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match="choose one of gather, ring, ulysses, usp"):
        model.Options(context="star")
    with pytest.raises(UserError, match="K=4 heads are no multiple of tp \\* cp = 8"):
        trained("qwen3", "cp=8", "dp", context="ulysses")
    with pytest.raises(UserError, match="under pp choose gather or ulysses"):
        trained("qwen3", "pp=2,cp=2", "dp", schedule="1f1b", accumulate=2, context="usp")
