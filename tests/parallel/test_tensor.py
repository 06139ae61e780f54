"""Tensor parallelism against one device, alone and with data parallelism; what it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.cross_entropy import reference
from parallel import mesh as M
from parallel import tensor, tensor_2d
from parallel.census import census
from parallel.mesh import ensure_varying
from parallel.model import Options
from tests.parallel import tiny
from tests.parallel.emulated import cases, relative
from tests.parallel.runs import differences, started, trained

CASES = {
    "tp": ("llama", "tp=4", "dp", {}),
    "tp, whole sequences": ("qwen3", "tp=4", "dp", {"sequence": False}),
    "tp, dp": ("qwen3", "dp=4,tp=2", "zero2", {"accumulate": 2}),
    "tp, fsdp": ("qwen3", "fsdp=4,tp=2", "zero3", {}),
    "tp, dp, nothing again": ("qwen3", "dp=2,tp=2", "dp", {"remat": "none", "unroll": 2}),
    "tp, fsdp, dp, whole sequences": ("llama", "dp=2,fsdp=2,tp=2", "zero1", {"sequence": False}),
}


DEFAULT = {"tp, dp, nothing again", "tp, fsdp, dp, whole sequences"}


@pytest.mark.parametrize("case", cases(CASES, DEFAULT))
def test_equals_one_device(case):
    name, mesh, builder, options = CASES[case]
    found = differences(trained(name, mesh, builder, **options), tiny.one_device(name))
    assert max(found.values()) < 1e-5, found


def not_summed(x, sequence):
    """Row-cut matrices whose results are not added up."""
    return jax.lax.psum(jnp.where(jax.lax.axis_index("tp") == 0, x, 0.0), "tp")


def averaged_gradient(x, sequence):
    """Right forward; the gradient is the mean over devices where it must be the sum."""
    x = ensure_varying(x, ("tp",))
    return x / 2 + jax.lax.stop_gradient(x / 2)


@pytest.mark.parametrize(("name", "wrong"), [("enter", averaged_gradient), ("leave", not_summed)])
def test_wrong_sums_are_rejected(name, wrong, monkeypatch):
    monkeypatch.setattr(tensor, name, wrong)
    found = differences(trained("qwen3", "tp=2", "dp", sequence=False), tiny.one_device("qwen3"))
    assert found["gradients"] > 1e-2, found


@pytest.mark.parametrize("sequence", [False, True])
def test_what_a_layer_sends(sequence):
    """Two pairs a layer; forward, again in the backward pass, and its own gradients."""
    step, state = started("llama", "tp=4", "dp", Options(sequence=sequence))
    inside = [c for c in census(tiny.compiled(step, state)) if c.depth == 1]
    activation = tiny.B * tiny.T * tiny.LLAMA.d_model * 4
    large = [c for c in inside if c.bytes * (c.group if c.op == "reduce-scatter" else 1)
             == activation]  # fmt: skip
    # Four all-reduces a layer and the forward's repetition, whose last sum nobody needs; or as many
    # pairs of all-gather and reduce-scatter.
    counts = {op: sum(c.op == op for c in large) for op in ("all-reduce", "all-gather",
                                                            "reduce-scatter")}  # fmt: skip
    if sequence:
        assert counts == {"all-reduce": 0, "all-gather": 6, "reduce-scatter": 5}
    else:
        assert counts == {"all-reduce": 5, "all-gather": 0, "reduce-scatter": 0}
    L, share = tiny.LLAMA.num_layers, 3 / 4
    pairs = 5.5 if sequence else 5
    assert sum(c.sent for c in large) == pairs * 2 * share * activation * L


@pytest.mark.parametrize("again", [True, False])
def test_a_head_cut_by_words_is_the_whole_one(again):
    """Both ways to its gradient, with a z term and a cap on logits; blocks that do not divide."""
    config = tiny.LLAMA.replace(logit_soft_cap=2.0)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(10, 8)).astype(np.float32), rng.normal(size=(8, 16)).astype(np.float32)
    targets, weights = rng.integers(0, 16, 10), rng.random(10).astype(np.float32)
    mesh = M.make(M.parse("tp=4"))

    def local(x, w, targets, weights):
        def loss(x, w):
            return tensor.cross_entropy(
                ensure_varying(x, ("tp",)), w, targets, weights, config, z_loss=0.3, again=again
            )

        (both, transpose) = jax.vjp(loss, x, w)
        return both, transpose((jnp.full((), 3.0), jnp.zeros(())))

    cut = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(None, "tp"), P(), P()),
        out_specs=(P(), (P(), P(None, "tp"))),
    )  # fmt: skip

    def whole(x, w):
        return reference.linear_cross_entropy(x, w, targets, weights, z_loss=0.3, soft_cap=2.0)

    both, transpose = jax.vjp(whole, x, w)
    wanted = both, transpose((jnp.full((), 3.0), jnp.zeros(())))
    found = jax.jit(cut)(x, w, targets, weights)
    assert relative(found, wanted) < 1e-5


def test_two_dimensions():
    """A grid of 2 x 4 against one device, messages as counted, sums along the wrong sides."""
    rng = np.random.default_rng(0)
    M_, D, F = 6, 8, 16
    x, gate, up, down = (
        rng.normal(size=s).astype(np.float32) for s in ((M_, D), (D, F), (D, F), (F, D))
    )
    mesh = M.make(M.parse("fsdp=2,tp=4"))
    wide, cut = P(None, "fsdp"), P("fsdp", "tp")
    specs = (wide, cut, cut, P("tp", "fsdp"))

    def cut_both_ways(sides):
        return jax.shard_map(
            lambda *local: tensor_2d.feed_forward(*local, jax.nn.silu, *sides),
            mesh=mesh, in_specs=specs, out_specs=wide, check_vma=sides == ("fsdp", "tp"),
        )  # fmt: skip

    def passes(function):
        loss = lambda *arrays: jnp.sum(jnp.sin(function(*arrays)))  # noqa: E731
        both = lambda *arrays: (function(*arrays), jax.grad(loss, range(4))(*arrays))  # noqa: E731
        return jax.jit(both)(x, gate, up, down)

    whole = lambda x, gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down  # noqa: E731
    assert relative(passes(cut_both_ways(("fsdp", "tp"))), passes(whole)) < 1e-5
    wrong = jax.jit(cut_both_ways(("tp", "fsdp")))
    assert relative(wrong(x, gate, up, down), whole(x, gate, up, down)) > 0.1
    program = jax.jit(cut_both_ways(("fsdp", "tp"))).lower(x, gate, up, down).compile()
    found = sum(c.sent for c in census(program))
    assert found == 4 * tensor_2d.sent(M_, D, F, 2, 4)
    share = {n: tensor_2d.sent(1, 1, 4, X, n // X) / tensor_2d.sent(1, 1, 4, 1, n)
             for n, X in ((16, 2), (64, 2), (256, 4))}  # fmt: skip
    assert share[16] == 1
    assert share[64] == pytest.approx(0.62, abs=0.005) and share[256] < 0.35
