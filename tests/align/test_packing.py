"""Packed rows: where sequences stand, and that no loss and no gradient knows of it."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from align import packing
from align.config import RLConfig
from align.experience import Experience
from align.losses import policy as kinds
from align.losses.policy import PolicyLoss
from align.objective import critic_objective, logps_of, packed, policy_objective
from align.packing import hidden, plan, rows_for
from align.preferences.rows import Batches
from align.rollout import Rollout
from align.step import create, make_step
from align.trainer_config import METHODS
from align.trainer_losses import make_objective
from align.trainer_plan import plan as dry_run
from align.trainer_step import begin, policy
from align.value_model import ValueModel
from jaxinfra.errors import UserError
from jaxinfra.model import transformer
from jaxinfra.train.config import OptimizerConfig
from tests.align import tiny, trainers
from tests.align.trainers import jsonl, model_file

slow = pytest.mark.slow
RNG = np.random.default_rng(0)
SIZES = np.asarray([3, 12, 5, 1, 7, 2, 12, 4], np.int32)
TOKENS = jnp.asarray(RNG.integers(2, tiny.MODEL.vocab_size, (8, 12)), jnp.int32)
FITTING = rows_for(SIZES, 12)


def relative(a, b):
    """The largest difference of two trees, by the largest number in them."""
    most = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(a))
    return tiny.difference(a, b) / most


@pytest.mark.parametrize("seed", range(3))
def test_all_sequences_stand_apart_in_as_few_rows_as_the_host_counts(seed):
    sizes = np.random.default_rng(seed).integers(0, 17, 24).astype(np.int32)
    rows = rows_for(sizes, 16)
    placed = jax.jit(plan, static_argnums=(1, 2))
    found = jax.device_get(placed(sizes, 16, rows))
    assert found.fits and not placed(sizes, 16, rows - 1).fits
    taken = [found.start[i] + t for i, n in enumerate(sizes) for t in range(n)]
    assert len(set(map(int, taken))) == len(taken) == int(np.sum(found.segments > 0))
    for i, n in enumerate(sizes):
        here = np.arange(int(found.start[i]), int(found.start[i]) + n)
        assert len({*(here // 16)}) <= 1  # no sequence goes over a row's end
        assert list(found.source.ravel()[here]) == [16 * i + t for t in range(n)]
        assert len({*found.segments.ravel()[here]}) <= 1
    for row in found.segments:
        spans = row[row > 0]
        assert np.all(np.diff(spans) >= 0) and len(spans) <= 16


def states(rows, sizes=SIZES):
    def pass_(params):
        where = plan(jnp.asarray(sizes), 12, rows) if rows else None
        return hidden(params, tiny.MODEL, TOKENS, where)

    x = np.asarray(jax.jit(pass_)(tiny.params()))
    return np.concatenate([x[i, :n] for i, n in enumerate(sizes)])


def test_hidden_states_are_those_of_rows_of_their_own():
    assert len(SIZES) // 2 + 1 > FITTING
    wanted, found = states(0), states(FITTING)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(states(FITTING - 1), wanted, rtol=1e-5, atol=1e-5)  # no room


def wrong(monkeypatch, change):
    """Packed with arguments of the forward pass changed."""
    real = transformer.hidden

    def mistaken(params, config, tokens, **options):
        if "segment_ids" in options:
            options = change(options, tokens)
        return real(params, config, tokens, **options)

    monkeypatch.setattr(packing.transformer, "hidden", mistaken)
    return np.max(np.abs(states(FITTING) - states(0)))


def restarted(segments):
    return transformer.positions_of(segments)


def test_without_the_segments_mask_sequences_see_each_other(monkeypatch):
    def unmasked(options, tokens):
        real = (options["segment_ids"] > 0).astype(jnp.int32)
        return options | {"segment_ids": real, "positions": restarted(options["segment_ids"])}

    assert wrong(monkeypatch, unmasked) > 0.1


def test_positions_of_a_sequence_may_be_shifted_but_not_spread(monkeypatch):
    """Rotation knows differences of positions alone: a start elsewhere is rounding, no mistake.

    What starting at zero buys is that positions stay below a sequence's length, not a row's.
    """

    def running(options, tokens):
        return options | {"positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)}

    def spread(options, tokens):
        return options | {"positions": 2 * restarted(options["segment_ids"])}

    assert wrong(monkeypatch, running) < 1e-4
    monkeypatch.undo()
    assert wrong(monkeypatch, spread) > 1e-2


RECORDS = {
    "sft": [{"prompt": "?" * n, "completion": "ab" * m} for n, m in ((1, 1), (3, 5), (2, 1))],
    "kto": [
        {"prompt": "?" * n, "completion": "ab" * m, "label": m > 1}
        for n, m in ((1, 1), (3, 5), (2, 1), (1, 2))
    ],
}
PAIRS = [
    {"prompt": "?" * n, "chosen": "a" * m, "rejected": "b" * k, "belief": "XY"[n % 2]}
    for n, m, k in ((1, 1, 9), (3, 5, 1), (2, 1, 2), (1, 2, 1))
]
QUICKLY = ("sft",)


@pytest.mark.parametrize(
    "method", [m if m in QUICKLY else pytest.param(m, marks=slow) for m in sorted(METHODS)]
)
def test_every_trainers_loss_and_gradient_are_the_unpacked_ones(tmp_path, method):
    data = jsonl(tmp_path, RECORDS.get(method, PAIRS))
    config = METHODS[method](data=data, max_length=32, dtype="float32", batch_size=3, steps=3)
    found, plain, batch = trainers.built(config)
    rows, unpacked, full = Batches(batch, len(found), 0).packed_rows(
        dataclasses.replace(config, batch_size=len(found))
    )
    assert full <= rows < unpacked
    packed = make_objective(config, trainers.MODEL, found.beliefs, rows=rows)
    trained, _ = begin(config, trainers.MODEL, trainers.params())

    def values(objective):
        def loss(trained, batch):
            model = policy(trained, None, config.lora)
            return objective.loss(model, batch, objective.counted(batch))

        valued = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return valued(trained, batch)

    (wanted, told), gradient = values(plain)
    (loss, metrics), mine = values(packed)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6, abs=1e-7)
    assert relative(gradient, mine) < 3e-6
    for name, value in told.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name


def experience(seed=0):
    """Rollouts of very different lengths, one of them empty, with numbers for all that is read."""
    rng, B, P, T = np.random.default_rng(seed), 8, 6, 9
    lengths, drawn = rng.integers(1, P + 1, B), rng.integers(1, T + 1, B)
    drawn[3] = 0
    mask = (np.arange(T) < drawn[:, None]).astype(np.float32)
    tokens = np.where(
        np.arange(P + T) < (lengths + drawn)[:, None], rng.integers(2, 12, (B, P + T)), 0
    )
    answer = np.zeros((B, T), np.int32)
    for i in range(B):
        answer[i, : drawn[i]] = tokens[i, lengths[i] : lengths[i] + drawn[i]]
    number = lambda scale=1.0: jnp.asarray(rng.normal(0, scale, (B, T)), jnp.float32)  # noqa: E731
    arrays = (tokens, lengths, answer, mask, np.log(0.3) * mask, np.ones(B, np.float32))
    r = Rollout(*(jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else None) for a in arrays))
    return r, number, mask


LOSSES = {
    name: getattr(kinds, name)
    for name in ("GRPO", "BNPO", "DR_GRPO", "DAPO", "GSPO", "LUSPO", "CISPO", "SAPO", "VESPO")
} | {"KL": PolicyLoss(kl_coef=0.1), "rloo": PolicyLoss()}


@pytest.mark.parametrize(
    "name", [n if n == "DAPO" else pytest.param(n, marks=slow) for n in LOSSES]
)
def test_every_policy_loss_and_aggregation_is_the_unpacked_one(name):
    r, number, mask = experience()
    base = RLConfig(
        prompts=2, group_size=4, max_new_tokens=9, loss=LOSSES[name],
        algorithm="rloo" if name == "rloo" else "grpo",
    )  # fmt: skip
    packed = dataclasses.replace(base, pack=0.75)
    old = logps_of(base, tiny.MODEL, tiny.params(), r, jnp.float32)[0] + number(0.1)
    advantages = jnp.broadcast_to(number()[:, :1], mask.shape)
    e = Experience(r, advantages[:, 0], r.mask, advantages, old_logps=old, ref_logps=old - 0.1)

    def values(config):
        def loss(p):
            return policy_objective(config, tiny.MODEL, p, e, jnp.float32)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(tiny.params())

    (wanted, told), gradient = values(base)
    (loss, metrics), found = values(packed)
    assert float(metrics["packing/fits"]) == 1.0
    filled = np.sum(np.asarray(r.lengths) + mask.sum(1) - 1) / (14 * 6)
    assert float(metrics["packing/fill"]) == pytest.approx(filled)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6, abs=1e-7)
    assert relative(gradient, found) < 3e-6
    assert all(float(metrics[k]) == pytest.approx(float(v), rel=1e-4, abs=1e-6)
               for k, v in told.items())  # fmt: skip


def test_a_tools_words_inside_an_answer_are_part_of_its_sequence():
    r, _, mask = experience()
    gap = jnp.asarray(np.where(np.arange(9) == 1, 0, mask), jnp.float32)
    config = RLConfig(prompts=2, group_size=4, max_new_tokens=9, pack=0.75)
    whole, found = packed(config, r), packed(config, dataclasses.replace(r, mask=gap))
    assert whole is not None and found is not None
    long = np.asarray(mask.sum(1)) > 2
    np.testing.assert_array_equal(whole.sizes[long], found.sizes[long])


@slow
def test_the_critics_loss_is_the_unpacked_one():
    r, number, _ = experience()
    base = RLConfig(algorithm="ppo", prompts=8, group_size=1, max_new_tokens=9)
    critic = ValueModel.from_policy(tiny.params()).replace(  # pyright: ignore
        value=jnp.asarray(RNG.normal(size=16), jnp.float32)
    )
    e = Experience(r, r.stopped, r.mask, number(), values=number(), returns=number())

    def values(config):
        def loss(c):
            return critic_objective(config, tiny.MODEL, c, e, jnp.float32)[0]

        return jax.jit(jax.value_and_grad(loss))(critic)

    wanted, found = values(base), values(dataclasses.replace(base, pack=0.75))
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-6)
    assert relative(wanted[1], found[1]) < 3e-6


@slow
def test_a_packed_run_learns_what_an_unpacked_one_learns():
    base = tiny.CONFIGS["dr_grpo_kl"]

    def run(config):
        step = make_step(config, tiny.MODEL, tiny.TASK.reward, steps=tiny.STEPS)
        step = jax.jit(step)
        state = create(config, tiny.params(), seed=0, steps=tiny.STEPS)
        for _ in range(5):
            state, metrics = step(state, tiny.PROBLEMS)
        return state.trained, metrics

    wanted, _ = run(base)
    found, metrics = run(dataclasses.replace(base, pack=0.9))
    assert float(metrics["packing/fits"]) > 0
    assert tiny.difference(wanted, found) < 1e-5


def test_the_plan_tells_what_packing_saves(tmp_path):
    data = jsonl(tmp_path, PAIRS)
    config = METHODS["dpo"](
        data=data, model=model_file(tmp_path), max_length=16, batch_size=4, steps=2, pack=True,
        optimizer=OptimizerConfig(),
    )  # fmt: skip
    with io.StringIO() as shown:
        dry_run(config, Console(file=shown, width=200))
        text = shown.getvalue()
    # prompt, answer and a token that begins and one that ends: 44 of 3 x 15 places
    assert "packed: 8 sequences a forward pass in 3 rows, 98% of them filled in place of" in text
    assert "62% of the tokens saved" in text
    with pytest.raises(UserError, match="pack lays sequences across"):
        dataclasses.replace(config, mesh="dp=2")
    with pytest.raises(UserError, match="share of the rows below 1"):
        RLConfig(pack=1.0)
