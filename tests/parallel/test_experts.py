"""Expert parallelism against one device that computes every expert for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import UserError
from jaxinfra.model import moe
from jaxinfra.model.config import Experts
from jaxinfra.model.params import MoE
from jaxinfra.train.step import TrainState
from parallel import experts
from parallel.census import census
from parallel.model import Options
from parallel.ragged import Sizes, ragged_all_to_all
from parallel.train import Strategy, build
from tests.parallel import tiny
from tests.parallel.emulated import RING, cases, over_ring, relative
from tests.parallel.runs import differences, started, trained

CASES = {
    "ep": ("ep=4", "dp", {}),
    "ep, dp, tp": ("dp=2,ep=2,tp=2", "zero1", {}),
    "ep, fsdp, cp": ("fsdp=2,ep=2,cp=2", "zero3", {}),
    "ragged": ("ep=4", "dp", {"dispatch": "ragged"}),
    "ragged, tp, fsdp": ("fsdp=2,ep=2,tp=2", "zero3", {"dispatch": "ragged"}),
    "ring": ("ep=4", "dp", {"dispatch": "ring"}),
    "tp, whole sequences": ("tp=2", "dp", {"sequence": False}),
}


DEFAULT = {"ep, fsdp, cp", "ragged"}


@pytest.mark.parametrize("case", cases(CASES, DEFAULT))
def test_equals_one_device(case):
    mesh, builder, options = CASES[case]
    found = differences(trained("moe", mesh, builder, **options), tiny.one_device("moe"))
    assert max(found.values()) < 1e-5, found


def test_a_balance_of_own_tokens_is_rejected(monkeypatch):
    """Means over one device's tokens instead of the batch's."""
    right = experts._everywhere

    def of_the_first(x, axes):
        return right(jnp.where(jax.lax.axis_index("ep") == 0, x, 0.0), axes)

    monkeypatch.setattr(experts, "_everywhere", of_the_first)
    found = differences(trained("moe", "ep=2", "dp"), tiny.one_device("moe"))
    assert found["gradients"] > 1e-2, found


def test_results_that_come_back_to_others_are_rejected(monkeypatch):
    right = experts._from_experts
    monkeypatch.setattr(experts, "_from_experts", lambda r: jnp.roll(right(r), 1, axis=0))
    found = differences(trained("moe", "ep=2", "dp"), tiny.one_device("moe"))
    assert found["gradients"] > 1e-2, found


def test_what_is_sent():
    """Two all-to-alls a layer forward, as many again in the backward pass's repetition and back."""
    step, state = started("moe", "ep=4", "dp", Options(remat="none"))
    found = [c for c in census(tiny.compiled(step, state)) if c.op == "all-to-all"]
    rows = tiny.B // 4 * tiny.T
    E, L, D = tiny.MOE.experts.num_experts, tiny.MOE.num_layers, tiny.MOE.d_model
    assert {(c.depth, c.executed, c.bytes) for c in found} == {(1, L, E * rows * D * 4)}
    assert len(found) == 4


def test_queues_that_overflow_drop_the_last_to_come():
    """Against a loop over tokens in plain NumPy."""
    rng = np.random.default_rng(0)
    config = tiny.MOE.experts
    E, D, F = config.num_experts, 6, 5
    layer = MoE(*(rng.normal(size=s).astype(np.float32)
                  for s in ((D, E), (E, D, F), (E, D, F), (E, F, D))))  # fmt: skip
    x = rng.normal(size=(2, 20, D)).astype(np.float32)
    weight = np.asarray(moe.route(jnp.asarray(x), layer.router, config)[0]).reshape(-1, E)
    C = experts.places(40, config, 0.8)
    expected, room, lost = np.zeros((40, D)), np.full(E, C), 0
    for t, token in enumerate(x.reshape(-1, D)):
        for e in np.flatnonzero(weight[t]):
            if room[e]:
                room[e] -= 1
                hidden = np.maximum(token @ layer.gate[e], 0) * (token @ layer.up[e])
                expected[t] += weight[t, e] * (hidden @ layer.down[e])
            else:
                lost += 1
    out, _, dropped = experts.feed_forward(
        layer, jnp.asarray(x), config, jax.nn.relu, jnp.ones((2, 20)), 0.8
    )
    assert C == 8 and lost > 0 and int(dropped) == lost
    assert relative(out.reshape(-1, D), expected) < 1e-5


def plain_ragged(xs, table, room):
    """Rows by sender, then zeros: in plain NumPy."""
    n, begins = len(xs), np.cumsum(table, axis=1) - table
    out = np.zeros((n, room, xs[0].shape[1]), np.float32)
    for to in range(n):
        got = [x[b : b + m] for x, b, m in zip(xs, begins[:, to], table[:, to], strict=True)]
        got = np.concatenate(got)[:room]
        out[to, : len(got)] = got
    return out


def test_the_emulated_message_is_the_one_defined():
    """Parts of any size, empty ones too; there and back is the identity; the transpose is back."""
    n, M, D = RING, 12, 3
    rng = np.random.default_rng(0)
    table = rng.multinomial(M - 2, [0.3, 0.3, 0.2, 0.2, 0, 0, 0, 0], size=n).astype(np.int32)
    xs = rng.normal(size=(n, M, D)).astype(np.float32)
    room = int(table.sum(axis=0).max())

    def there_and_back(x):
        sizes = Sizes(jnp.asarray(table))
        there = lambda x: ragged_all_to_all(x, room, sizes, "tp")  # noqa: E731
        y, transpose = jax.vjp(there, x)
        return y, ragged_all_to_all(y, M, sizes.back, "tp"), transpose(2 * y)[0]

    y, again, gradient = over_ring(there_and_back)(xs.reshape(n * M, D))
    np.testing.assert_array_equal(np.reshape(y, (n, room, D)), plain_ragged(xs, table, room))
    sent = xs.copy()
    sent[:, M - 2 :] = 0  # rows of no part
    np.testing.assert_array_equal(np.reshape(again, xs.shape), sent)
    np.testing.assert_array_equal(np.reshape(gradient, xs.shape), 2 * sent)


def test_a_wrong_place_in_the_message_is_rejected(monkeypatch):
    """The offsets of the sender taken for those of the receiver."""
    monkeypatch.setattr(Sizes, "put_at", Sizes.sent_from)
    found = differences(trained("moe", "ep=2", "dp", dispatch="ragged"), tiny.one_device("moe"))
    assert found["gradients"] > 1e-2, found


@pytest.mark.slow
def test_what_the_other_ways_send():
    """Ring: all tokens to all, results summed. Ragged, emulated: parts of the largest size."""
    rows, L, D = tiny.B // 4 * tiny.T, tiny.MOE.num_layers, tiny.MOE.d_model
    k = tiny.MOE.experts.top_k
    for dispatch, op, size in (
        ("ring", "reduce-scatter", rows * D * 4),
        ("ragged", "all-to-all", 4 * rows * k * D * 4),
    ):
        step, state = started("moe", "ep=4", "dp", Options(remat="none", dispatch=dispatch))
        found = [c for c in census(tiny.compiled(step, state)) if c.depth and c.op == op]
        assert size in {c.bytes for c in found}, (dispatch, found)
        assert {c.executed for c in found} == {L}


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["ragged", "ring"])
def test_on_hopper_a_step_takes_the_grouped_kernel(dispatch, monkeypatch):
    """Lowered for a GPU that is not here; XLA's product is what the CPU takes."""
    config = tiny.MOE.replace(d_model=64, experts=Experts(8, 2, 64, True, balance_coef=0.1))
    state = jax.eval_shape(lambda: TrainState.create(tiny.params(config), tiny.optimizer()))
    tokens = {"tokens": jax.ShapeDtypeStruct((8, 17), jnp.int32)}

    def lowered():
        strategy = Strategy("dp=2,ep=2", dispatch=dispatch)
        _, step, _ = build(strategy, config, tiny.optimizer(), dtype=jnp.bfloat16)
        return step.trace(state, tokens).lower(lowering_platforms=("cuda",)).as_text()

    assert "mosaic_gpu" not in lowered()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = lowered()
    assert "mosaic_gpu" in text and ("ragged_all_to_all" in text) == (dispatch == "ragged")


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match="choose one of padded, ragged, ring"):
        Options(dispatch="pigeons")
    with pytest.raises(UserError, match="drops nothing"):
        trained("moe", "ep=2", "dp", dispatch="ring", capacity_factor=1.0)
    with pytest.raises(UserError, match="set the model's balance_coef to 0"):
        trained("moe", "pp=2", "dp", schedule="1f1b", accumulate=2)
