"""The model through a pipeline against one device, alone and with every other axis."""

import jax.numpy as jnp
import pytest

from jaxinfra.errors import UserError
from jaxinfra.model import presets
from parallel.pipeline import stages, train
from parallel.pipeline.schedule import make
from parallel.train import Strategy, build
from tests.parallel import runs, tiny
from tests.parallel.emulated import cases, relative
from tests.parallel.runs import differences, trained

CASES = {
    "1f1b": ("qwen3", "pp=4", "dp", "1f1b", {"accumulate": 4}),
    "gpipe": ("llama", "pp=2", "dp", "gpipe", {"accumulate": 4}),
    "interleaved": ("qwen3", "pp=2", "dp", "interleaved", {"accumulate": 2}),
    "zero bubble": ("llama", "pp=4", "dp", "zb-h1", {"accumulate": 4}),
    "eager, zero1": ("qwen3", "pp=2,dp=4", "zero1", "eager-1f1b", {"accumulate": 2}),
    "1f1b, fsdp, tp": ("qwen3", "pp=2,fsdp=2,tp=2", "zero3", "1f1b", {"accumulate": 2}),
    "zero bubble, dp, tp": ("qwen3", "pp=2,dp=2,tp=2", "zero2", "zb-h1", {"accumulate": 2}),
    "uneven, interleaved": (
        "llama", "pp=2,dp=2", "zero2", "interleaved", {"accumulate": 2, "layers": (1, 2, 0, 1)}),
    "uneven, zero bubble": ("qwen3", "pp=2", "dp", "zb-h1", {"accumulate": 2, "layers": (3, 1)}),
    "1f1b, whole sequences": (
        "llama", "pp=2,tp=4", "dp", "eager-1f1b", {"accumulate": 2, "sequence": False}),
}  # fmt: skip


DEFAULT = {"zero bubble, dp, tp", "1f1b, fsdp, tp", "uneven, interleaved"}


@pytest.mark.parametrize("case", cases(CASES, DEFAULT))
def test_equals_one_device(case):
    name, mesh, builder, schedule, options = CASES[case]
    found = trained(name, mesh, builder, schedule=schedule, **options)
    found = differences(found, tiny.one_device(name))
    assert max(found.values()) < 1e-5, found


def test_layers_that_are_in_other_places_are_rejected(monkeypatch):
    """The order of stages read as that of the model."""
    monkeypatch.setattr(runs, "to_stages", lambda params, *_: params)
    found = trained("qwen3", "pp=2", "dp", schedule="interleaved", accumulate=2)
    assert differences(found, tiny.one_device("qwen3"))["gradients"] > 1e-2


def in_order(mesh, **fields):
    """A run whose parameters stay in the model's order, as `jaxinfra train` has it."""
    tx = tiny.optimizer()
    layout, step, specs = build(
        Strategy(mesh, schedule="interleaved", **fields), tiny.QWEN, tx, dtype=jnp.float32,
        accumulate=2,
    )  # fmt: skip
    state = layout.place(tiny.start(tiny.QWEN), specs)
    return differences(tiny.run(step, state), tiny.one_device("qwen3"))


def test_chunks_are_sent_to_their_stages_and_back(monkeypatch):
    found = in_order("pp=2,dp=2", zero=2)
    assert max(found.values()) < 1e-5, found
    monkeypatch.setattr(train, "collected", lambda chunks, _: chunks)
    assert in_order("pp=2")["gradients"] > 1e-2


@pytest.mark.parametrize(("P", "C"), [(2, 2), (4, 2), (2, 4), (3, 4), (6, 4), (4, 1)])
def test_every_round_takes_one_chunk_from_and_to_every_stage(P, C):
    at = {}
    for take, put, pairs in stages._rounds(make("interleaved", P, P, C)):
        assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == list(range(P))
        at |= {(b, put[b]): a * C + take[a] for a, b in pairs}
    assert at == {(v % P, v // P): v for v in range(C * P)}


def test_the_last_stage_gets_fewer_layers():
    config, table = presets.find("llama-3.1-8b"), make("1f1b", 4, 8)
    head = stages.head_in_layers(config, 4096)
    assert 2 < head < 3
    layers = stages.balanced(config, 4096, table)
    assert layers == (9, 9, 8, 6) and sum(layers) == config.num_layers
    longest = lambda layers: max(*layers[:-1], layers[-1] + head)  # noqa: E731
    assert longest(layers) < longest(stages.even(32, table))
    assert sum(stages.balanced(config, 4096, make("interleaved", 3, 6))) == 32  # any number
    with pytest.raises(UserError, match="fewer than 64 stages"):
        stages.balanced(config, 4096, make("interleaved", 32, 32))


def test_places_and_back():
    table = make("interleaved", 2, 2)
    assert stages.order((1, 2, 0, 1), table).tolist() == [0, -1, -1, -1, 1, 2, 3, -1]
    whole = tiny.params(tiny.QWEN)
    there = stages.to_stages(whole, (1, 2, 0, 1), table)
    assert there.layers.attn.q.shape[0] == 8 and not there.layers.attn.q[1].any()
    assert relative(stages.from_stages(there, (1, 2, 0, 1), table), whole) == 0


@pytest.mark.parametrize(
    ("mesh", "schedule", "accumulate", "told"),
    [
        ("pp=8", "1f1b", 2, "L=4 of attn_norm"),
        ("pp=4", "interleaved", 4, "4 layers are no multiple of 4 stages of 2 chunks"),
        ("pp=2", "1f1b", 3, "B=8 rows are no multiple of 3"),
    ],
)
def test_what_does_not_fit_is_told_before_the_first_step(mesh, schedule, accumulate, told):
    with pytest.raises(UserError, match=told):
        trained("qwen3", mesh, "dp", schedule=schedule, accumulate=accumulate)
