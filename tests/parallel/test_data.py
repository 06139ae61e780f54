"""Data parallelism against one device: what it computes, what it sends, what it keeps."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxinfra.errors import UserError
from jaxinfra.train.step import TrainState
from parallel import data, layout, model
from parallel import mesh as M
from parallel.census import census, totals
from parallel.layout import Layout, bytes_on_a_device, summed
from parallel.model import Options
from tests.parallel import tiny
from tests.parallel.emulated import cases, relative
from tests.parallel.runs import differences, started, trained

CASES = {
    "annotated": ("qwen3", "fsdp=8", "annotated", {}),
    "annotated, accumulated": ("llama", "dp=2,fsdp=2", "annotated", {"accumulate": 2}),
    "dp": ("qwen3", "dp=8", "dp", {}),
    "dp of one device": ("qwen3", "dp=1", "dp", {}),
    "dp, accumulated": ("qwen3", "dp=2", "dp", {"accumulate": 4}),
    "dp, kept activations": ("llama", "dp=4", "dp", {"remat": "none"}),
    "fsdp, tp, kept attention": ("llama", "fsdp=2,tp=2", "zero3", {"remat": "attention"}),
    "fsdp, tp, kept products": ("qwen3", "fsdp=2,tp=2", "zero3", {"remat": "matmuls"}),
    "fsdp, tp, offloaded": ("llama", "fsdp=2,tp=2", "zero3", {"remat": "offload"}),
    "hsdp": ("qwen3", "dp=2,fsdp=4", "zero3", {}),
    "zero1": ("llama", "dp=8", "zero1", {}),
    "zero2": ("qwen3", "dp=8", "zero2", {}),
    "zero2 over fsdp": ("llama", "dp=2,fsdp=2", "zero2", {}),
    "zero3": ("llama", "fsdp=8", "zero3", {}),
    "zero3, accumulated": ("qwen3", "fsdp=4", "zero3", {"accumulate": 2}),
}


def test_the_oracle_is_the_gradient_of_the_loss():
    assert relative(tiny.one_device("qwen3")["gradients"], tiny.gradient_of_loss("qwen3")) < 1e-5


DEFAULT = {"annotated", "dp, accumulated", "hsdp", "zero2 over fsdp"}


@pytest.mark.parametrize("case", cases(CASES, DEFAULT))
def test_equals_one_device(case):
    name, mesh, builder, options = CASES[case]
    found = differences(trained(name, mesh, builder, **options), tiny.one_device(name))
    assert max(found.values()) < 1e-5, found


def averaged(grads, specs, but=()):
    return jax.tree.map(lambda g: g / 2, summed(grads, specs, but=but))


def summed_twice(grads, specs, but=()):
    return jax.tree.map(lambda g: lax.psum(g, "dp"), summed(grads, specs, but=but))


def own_count(rows):
    """Each device divides by its own targets: wrong where rows have unequal numbers of them."""
    return lax.psum(M.ensure_varying(rows["weights"].sum(), ("dp",)), "dp") / 2 + 0 * 1.0


WRONG = {
    "gradients averaged": (data, "summed", averaged),
    "gradients summed twice": (data, "summed", summed_twice),
    "losses divided by a device's share": (model, "count_of", own_count),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_wrong_reductions_are_rejected(case, monkeypatch):
    monkeypatch.setattr(*WRONG[case])
    found = differences(trained("qwen3", "dp=2", "dp"), tiny.one_device("qwen3"))
    assert found["gradients"] > 1e-2, found


def test_a_forgotten_reduction_does_not_type(monkeypatch):
    monkeypatch.setattr(data, "summed", lambda grads, specs: grads)
    with pytest.raises(ValueError, match="require replication"):
        trained("qwen3", "dp=2", "dp")


SMALL = 300  # bytes: sums of squares of the norm, one a leaf, and metrics


def parts(config):
    """(bytes of all parameters, bytes of one layer's that fsdp cuts, of the rest that it cuts)."""
    tree = tiny.params(config)
    every = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    heads = [tree.layers.attn.q_norm, tree.layers.attn.k_norm]
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(tree.layers))
    layer -= sum(leaf.nbytes for leaf in heads if leaf is not None)
    return every, layer // config.num_layers, tree.embed.nbytes + tree.final_norm.nbytes


@functools.cache
def found(mesh, builder, **options):
    step, state = started("qwen3", mesh, builder, Options(**options))
    return census(tiny.compiled(step, state))


def test_dp_reduces_once_however_many_parts_are_accumulated():
    every, _, _ = parts(tiny.QWEN)
    reductions = [c for c in found("dp=2", "dp", accumulate=4) if c.bytes > 4]
    assert [(c.op, c.depth, c.executed) for c in reductions] == [("all-reduce", 0, 1)]
    assert reductions[0].bytes == every + 3 * 4  # with loss, nll and the targets told


def test_zero1_reduces_all_and_gathers_all():
    every, _, _ = parts(tiny.QWEN)
    sums = totals(found("dp=8", "zero1"))
    assert set(sums) == {"all-reduce", "all-gather"}
    whole = 2 * tiny.params(tiny.QWEN).layers.attn.q_norm.nbytes  # [4, 6]: nothing divides by 8
    assert every <= sums["all-reduce"][1] <= every + SMALL
    assert sums["all-gather"][1] == every - whole


def test_zero2_scatters_what_zero1_reduces():
    every, _, _ = parts(tiny.QWEN)
    sums = totals(found("dp=8", "zero2"))
    whole = 2 * tiny.params(tiny.QWEN).layers.attn.q_norm.nbytes
    assert sums["reduce-scatter"][1] * 8 == every - whole
    assert sums["all-gather"][1] == every - whole
    assert whole <= sums["all-reduce"][1] <= whole + SMALL
    sent = {b: sum(c.sent for c in found("dp=8", b)) for b in ("zero1", "zero2")}
    assert sent["zero1"] / sent["zero2"] == pytest.approx(1.5, rel=0.02)


def test_zero3_gathers_a_layer_at_a_time():
    """Each layer twice, for the forward and for the backward pass, which makes it again."""
    every, layer, rest = parts(tiny.QWEN)
    L = tiny.QWEN.num_layers
    collectives = found("fsdp=8", "zero3")
    inside = totals([c for c in collectives if c.depth == 1])
    assert inside["all-gather"][1] == 2 * L * layer
    assert inside["reduce-scatter"][1] * 8 == L * layer
    outside = totals([c for c in collectives if c.depth == 0])
    assert outside["all-gather"][1] == rest  # the tied embedding once, for the rows and the head
    assert outside["all-reduce"][1] <= every - L * layer - rest + SMALL


@functools.cache
def temporary(remat):
    step, state = started("llama", "fsdp=2,tp=2", "zero3", Options(remat=remat))
    return tiny.compiled(step, state).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_what_is_kept_takes_memory():
    kept = [temporary(remat) for remat in ("none", "matmuls", "attention", "full")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


@functools.cache
def step_memory(builder):
    """Temporary bytes of a step that keeps all activations, which are most of it."""
    config = tiny.QWEN.replace(num_layers=2, d_model=64, d_ff=192)
    made = Layout(config, M.make(M.parse("fsdp=2")))
    tx, options = tiny.optimizer(), Options(remat="none")
    if builder == "annotated":
        step = data.annotated(made, tx, options, tiny.RATE)
    else:
        step = data.zero3(made, tx, options)
    state = jax.eval_shape(lambda: TrainState.create(tiny.params(config), tx))
    batch = {"tokens": jax.ShapeDtypeStruct((8, 129), jnp.int32)}
    program = step.lower(state, batch).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_annotations_take_the_memory_of_zero3():
    assert step_memory("annotated") < 1.1 * step_memory("zero3")


@pytest.mark.slow
def test_what_the_compiler_chooses_without_annotations_takes_more_memory(monkeypatch):
    """Activations of all rows on every device."""
    monkeypatch.setattr(layout, "_annotated_whole", lambda leaf, spec: leaf)
    monkeypatch.setattr(data, "_annotated", lambda x, spec: x)
    assert step_memory.__wrapped__("annotated") > 1.5 * step_memory("zero3")


def test_what_annotations_do_not_take_is_told():
    for config, mesh in ((tiny.MOE, "fsdp=2"), (tiny.QWEN, "fsdp=2,tp=2")):
        made = Layout(config, M.make(M.parse(mesh)))
        with pytest.raises(UserError, match="choose zero3"):
            data.annotated(made, tiny.optimizer(), Options(), tiny.RATE)


def test_annotations_alone_send_more_than_zero3_and_scatter_nothing():
    theirs, ours = found("fsdp=8", "annotated"), found("fsdp=8", "zero3")
    assert "reduce-scatter" not in totals(theirs)
    assert sum(c.sent for c in theirs) > sum(c.sent for c in ours)


def test_what_a_device_keeps():
    def kept(mesh, builder):
        layout = Layout(tiny.QWEN, M.make(M.parse(mesh)))
        tx = tiny.optimizer()
        cut = layout.cut_further(M.Axis.DP) if builder in ("zero1", "zero2") else None
        specs = layout.state_specs(tx, cut)
        _, state = started("qwen3", mesh, builder, Options())
        for leaf, kept in ((state.params, specs.params), (state.opt_state, specs.opt_state)):
            counted = bytes_on_a_device(leaf, kept, layout.mesh)
            device = jax.devices()[0]
            shards = [s.data.nbytes for x in jax.tree.leaves(leaf) for s in x.addressable_shards
                      if s.device == device]  # fmt: skip
            assert counted == sum(shards)
            yield counted

    params, moments = kept("dp=8", "dp")
    heads = 2 * tiny.params(tiny.QWEN).layers.attn.q_norm.nbytes
    counters = moments - 3 * params  # gradients kept by the tests, two moments, counters
    assert list(kept("dp=8", "zero2")) == [
        params, counters + 3 * ((params - heads) // 8 + heads)
    ]  # fmt: skip
    assert next(kept("fsdp=8", "zero3")) == (params - heads) // 8 + heads


@pytest.mark.parametrize(
    ("mesh", "options", "told"),
    [("dp=8", {"accumulate": 2}, "B=8 rows are no multiple of 16"), ("tp=8", {}, "K=4 of k")],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_the_first_step(mesh, options, told):
    with pytest.raises(UserError, match=told):
        trained("qwen3", mesh, "dp", **options)
