"""Trainers: known optima, resumption to the bit, accumulation, adapters, steps left out."""

import dataclasses
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from align import synthetic
from align.losses import ContrastiveLoss, PreferenceLoss, mixture_distance
from align.synthetic import optimum
from align.trainer import train
from align.trainer_config import DPO, GDPO, KTO, METHODS, ORPO, SFT, LoRA, Reward, SimPO
from align.trainer_mesh import place
from align.trainer_step import policy
from align.value_model import load_reward_model, sequence_scores
from jaxinfra.loading import load
from jaxinfra.model import transformer
from tests.align.tiny import difference, equal_bits
from tests.align.trainers import (
    FAST,
    MODEL,
    TOKENIZER,
    built,
    fit,
    jsonl,
    logp,
    logps,
    model_file,
    model_folder,
    params,
    start,
)

slow = pytest.mark.slow
SHARED = {"optimizer": FAST, "steps": 150, "max_length": 32, "dtype": "float32"}
P_A = 0.75  # how often a is preferred to b
LOGIT = np.log(P_A / (1 - P_A))


@pytest.fixture
def two(tmp_path):
    """Four pairs of two answers, of which a is chosen in three."""
    pairs = [("a", "b")] * 3 + [("b", "a")]
    return jsonl(tmp_path, [{"prompt": "?", "chosen": c, "rejected": r} for c, r in pairs])


E = 0.1
FAMILY = {  # what the difference of log-ratios c_a - c_b is at the minimum, for beta 1
    "sigmoid": ({}, LOGIT),
    "sigmoid, smoothed": ({"label_smoothing": E}, np.log(0.7 / 0.3)),  # .75 .9 + .25 .1
    "robust": ({"label_smoothing": E}, np.log((P_A - E) / (1 - P_A - E))),
    "ipo": ({}, 2 * (2 * P_A - 1) / 2),  # answers have two tokens
    "sigmoid_norm": ({}, 2 * LOGIT),
    "hinge": ({}, 1.0),
    "exo_pair": ({"label_smoothing": E}, (2 * P_A - 1) * np.log((1 - E) / E)),
    "nca_pair": ({}, np.log(2 * P_A) - np.log(2 * (1 - P_A))),
    "bco_pair": ({}, 2 * LOGIT),
    "sppo_hard": ({}, 2 * P_A - 1),
}
QUICKLY = ("sigmoid",)


@pytest.mark.parametrize(
    "name", [n if n in QUICKLY else pytest.param(n, marks=slow) for n in FAMILY]
)
def test_dpo_and_its_family_reach_their_optimum(two, name):
    options, wanted = FAMILY[name]
    loss = PreferenceLoss(kind=name.partition(",")[0], beta=1.0, **options)
    trained, _, metrics = fit(DPO(data=two, loss=loss, **SHARED))
    moved = logps(trained, "ab") - logps(params(), "ab")
    assert moved[0] - moved[1] == pytest.approx(wanted, rel=0.02)
    assert float(metrics["rewards/margins"]) == pytest.approx((2 * P_A - 1) * wanted, rel=0.02)
    assert float(metrics["rewards/accuracies"]) == P_A


@slow
@pytest.mark.parametrize("kind", ["aot", "aot_unpaired", "apo_zero", "apo_down", "discopop"])
def test_losses_without_a_finite_optimum_prefer_what_is_chosen(two, kind):
    loss = PreferenceLoss(kind=kind, beta=0.1)
    trained, first, last = fit(DPO(data=two, loss=loss, **SHARED | {"steps": 40}))
    moved = logps(trained, "ab") - logps(params(), "ab")
    assert float(last["loss"]) < float(first["loss"])
    if kind != "discopop":  # whose slope at 0 leads away from what is chosen, at tau 0.05
        assert moved[0] > moved[1] + 1.0


def shares(logps):
    return np.exp(logps) / np.exp(logps).sum()


@slow
@pytest.mark.parametrize("rank", [0, 4])
def test_dpo_reaches_the_synthetic_sets_optimum(tmp_path, rank):
    """Through the whole run: data, reference, checkpoints, export; with adapters as well."""
    config = DPO(
        out=tmp_path / "run", finetune=model_folder(tmp_path), loss=PreferenceLoss(beta=0.5),
        lora=LoRA(rank=rank), batch_size=12, **SHARED | {"steps": 200},
    )  # fmt: skip
    result = train(config, console=Console(quiet=True))
    answers = "".join(synthetic.WEIGHTS)
    begun = params()
    rewards = jnp.log(jnp.asarray(list(synthetic.WEIGHTS.values()), jnp.float32))
    wanted = optimum(rewards, jnp.asarray(logps(begun, answers), jnp.float32), 0.5)
    assert result.model is not None
    found = shares(logps(load(result.model).params, answers))
    assert 0.5 * np.abs(found - wanted).sum() < 0.02
    assert 0.5 * np.abs(shares(logps(begun, answers)) - wanted).sum() > 0.1
    assert {"rewards/chosen", "rewards/margins", "logps/chosen", "lr"} <= set(result.rows[-1])
    assert result.rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert (tmp_path / "run" / "adapter").exists() == bool(rank)


@slow
def test_sft_learns_how_often_each_answer_was_given():
    trained, _, metrics = fit(SFT(**SHARED))
    counts = np.asarray(list(synthetic.WEIGHTS.values()))
    found = np.exp(logps(trained, "".join(synthetic.WEIGHTS)))
    assert 0.5 * np.abs(found - counts / counts.sum()).sum() < 0.02
    entropy = -np.sum(counts / counts.sum() * np.log(counts / counts.sum())) / 2
    assert float(metrics["loss"]) == pytest.approx(entropy, rel=0.02)


@slow
def test_a_reward_model_learns_the_odds(two):
    trained, first, metrics = fit(Reward(data=two, **SHARED))
    tokens = jnp.asarray([[*TOKENIZER.encode("?" + answer), 257] for answer in "ab"])
    a, b = sequence_scores(trained, MODEL, tokens, jnp.asarray([4, 4]))
    assert float(a - b) == pytest.approx(LOGIT, rel=0.02)
    assert float(first["margin"]) == 0.0 and float(metrics["accuracy"]) == P_A


def best(loss, low=-5.0, high=5.0):
    grid = np.linspace(low, high, 20_001)
    return grid[np.argmin(loss(grid))]


@slow
@pytest.mark.parametrize("kind", ["simpo", "sigmoid"])
def test_simpo_and_cpo_reach_their_optimum(two, kind):
    loss = ContrastiveLoss(kind=kind, beta=2.0, gamma=0.5)
    trained, _, _ = fit(SimPO(data=two, loss=loss, **SHARED))
    found = logps(trained, "ab")
    if kind == "sigmoid":
        assert found[0] - found[1] == pytest.approx(LOGIT / 2, rel=0.02)
        return
    wanted = best(
        lambda u: P_A * np.log1p(np.exp(0.5 - 2 * u)) + (1 - P_A) * np.log1p(np.exp(0.5 + 2 * u))
    )
    assert (found[0] - found[1]) / 2 == pytest.approx(wanted, rel=0.02)


@slow
@pytest.mark.parametrize("config", [KTO(**SHARED), ORPO(**SHARED)], ids=["kto", "orpo"])
def test_kto_and_orpo_prefer_what_is_better(config):
    trained, first, last = fit(dataclasses.replace(config, steps=40))
    found = logps(trained, "abc")
    if isinstance(config, KTO):
        found = found - logps(params(), "abc")
    assert found[0] > max(found[1:]) + 0.5 and float(last["loss"]) < float(first["loss"])


def test_gdpo_keeps_a_mixture_that_dpo_collapses(tmp_path):
    loss = PreferenceLoss(beta=0.1)
    trained, _, metrics = fit(GDPO(loss=loss, **SHARED))
    (x, y), sizes = synthetic.GROUPS, [size for *_, size in synthetic.GROUPS.values()]
    target = np.asarray(sizes) / sum(sizes)
    logits = transformer.forward(trained, MODEL, jnp.asarray([TOKENIZER.encode("?")]))[0, -1]
    beliefs = np.asarray(jax.nn.softmax(logits))[[ord(x), ord(y)]]
    assert 0.5 * np.abs(beliefs - target).sum() < 0.02
    mixture = sum(
        share * shares(logps(trained, "ab", belief=belief))
        for share, belief in zip(beliefs, (x, y), strict=True)
    )
    pooled = [
        {"prompt": "?", "chosen": r["chosen"], "rejected": r["rejected"]}
        for r in synthetic.records("gdpo")
    ]
    collapsed, _, _ = fit(DPO(data=jsonl(tmp_path, pooled), loss=loss, **SHARED))
    apart = [float(mixture_distance(jnp.asarray(target), jnp.asarray(m)))
             for m in (mixture, shares(logps(collapsed, "ab")))]  # fmt: skip
    assert apart[0] < 0.01 and apart[1] > 0.1
    assert float(metrics["belief_kl"]) < 0.01


def test_the_reference_is_each_rows_own_log_probability(tmp_path):
    """Rows of many lengths, padded and gathered together, against one forward pass of each."""
    records = [
        {"prompt": "12+30=", "chosen": "42", "rejected": "4"},
        {"prompt": "x", "chosen": "a longer answer", "rejected": "short"},
    ]
    _, _, batch = built(DPO(data=jsonl(tmp_path, records), **SHARED))
    for i, record in enumerate(records):
        for j, name in enumerate(("chosen", "rejected")):
            wanted = logp(params(), record["prompt"], record[name])
            assert float(batch["reference"][i, j]) == pytest.approx(wanted, rel=1e-5)


RAGGED = [
    {"prompt": "ab", "chosen": "12345", "rejected": "1"},
    {"prompt": "abc", "chosen": "1", "rejected": "222"},
    {"prompt": "a", "chosen": "77", "rejected": "7777"},
    {"prompt": "abcde", "chosen": "9", "rejected": "99"},
]


@pytest.mark.parametrize("kind", [ORPO, pytest.param(DPO, marks=slow)])
def test_parts_of_a_batch_are_the_batch(tmp_path, kind):
    data = jsonl(tmp_path, RAGGED)
    found = []
    for parts in (1, 2):
        state, _, step, batch = start(kind(data=data, accumulate=parts, **SHARED))
        found.append(step(state, batch))
    (one, first), (two, second) = found
    assert difference(one.params, two.params) < 1e-5
    for name in set(first):
        assert float(first[name]) == pytest.approx(float(second[name]), rel=1e-4, abs=1e-6), name


@slow
def test_adapters_alone_are_trained(two):
    config = DPO(data=two, lora=LoRA(rank=2, targets=("q", "down")), **SHARED)
    state, frozen, step, batch = start(config)
    before = jax.tree.map(jnp.array, frozen)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert state.params.params is None and equal_bits(frozen, before)
    assert set(state.params.adapters) == {"q", "down"} and float(metrics["grad_norm"]) > 0
    apart = policy(state.params, frozen, config.lora)
    tokens = jnp.asarray([TOKENIZER.encode("?a")])
    whole = transformer.forward(apart, MODEL, tokens)
    assert difference(whole, transformer.forward(frozen, MODEL, tokens)) > 1e-3


@slow
@pytest.mark.parametrize("rank", [2, 0])
def test_a_mesh_of_eight_is_one_device(rank):
    """Rows over dp and fsdp, parameters over fsdp and tp; four steps of both."""
    model = MODEL.replace(num_kv_heads=2)
    gentle = dataclasses.replace(FAST, learning_rate=1e-3)  # Adam makes a step of noise near 0
    config = DPO(
        lora=LoRA(rank=rank), loss=PreferenceLoss(beta=0.5), batch_size=12, accumulate=3,
        **SHARED | {"steps": 4, "optimizer": gentle},
    )  # fmt: skip
    found = []
    for mesh in (None, "dp=2,fsdp=2,tp=2"):
        state, frozen, step, batch = start(dataclasses.replace(config, mesh=mesh), model)
        losses = []
        for _ in range(config.steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        found.append((jax.device_get(state), losses))
    matrix = (frozen if rank else state.params.params).layers.mlp.up
    assert len(matrix.sharding.device_set) == 8 and not matrix.sharding.is_fully_replicated
    (one, first), (eight, second) = found
    assert difference(one.params, eight.params) < 1e-5
    assert second == pytest.approx(first, abs=1e-5) and first[-1] < first[0] - 1e-3


@pytest.mark.parametrize(
    ("mesh", "words"),
    [("pp=2", "leave pp out"), ("dp=8", "parts of 4 rows do not divide over 8"),
     ("tp=2", "num_kv_heads|does not divide|divisible|multiple"), ("dp=16", "needs 16 devices")],
)  # fmt: skip
def test_a_mesh_that_does_not_fit(mesh, words):
    with pytest.raises(ValueError, match=words):
        place(DPO(batch_size=8, accumulate=2, mesh=mesh), MODEL)


def test_a_step_that_is_not_finite_is_left_out(two):
    state, _, step, batch = start(DPO(data=two, **SHARED))
    broken = batch | {"reference": batch["reference"] * np.nan}
    after, metrics = step(state, broken)
    assert equal_bits((after.params, after.opt_state), (state.params, state.opt_state))
    assert int(after.skipped) == 1 and int(after.step) == 1 and int(metrics["skipped"]) == 1
    after, metrics = step(after, batch)
    assert int(after.skipped) == 1 and difference(after.params, state.params) > 1e-4


_SCRIPT = """
    import os, signal, sys, time
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from pathlib import Path
    from align.trainer import train
    from tests.align.test_trainers import resumable

    def on_row(row):
        if row["step"] == 5:  # before the checkpoint of step 8, with that of step 4 on disk
            while not (Path(sys.argv[1]) / "run" / "checkpoints" / "4").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    train(resumable(Path(sys.argv[1]), "run"), on_row=on_row)
"""


def resumable(folder, name, **changes):
    options = {"steps": 8, "lora": LoRA(rank=2), "batch_size": 4, "accumulate": 2,
               "checkpoint_every": 4, "validation": 0.1, "eval_every": 4}  # fmt: skip
    model = str(folder / "config.json")
    return KTO(out=folder / name, model=model, **SHARED | options | changes)


@slow
@pytest.mark.timeout(2400)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    model_file(tmp_path)
    whole = train(resumable(tmp_path, "whole"), console=Console(quiet=True))
    command = [sys.executable, "-c", textwrap.dedent(_SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    reference = tmp_path / "run" / "reference.npz"
    made = reference.stat().st_mtime_ns
    resumed = train(resumable(tmp_path, "run", resume=True), console=Console(quiet=True))
    assert equal_bits(resumed.state, whole.state)
    assert lasting(resumed.rows) == lasting(whole.rows)
    assert reference.stat().st_mtime_ns == made  # read, not computed again
    assert "eval_loss" in whole.rows[3] and [row["step"] for row in whole.rows] == [*range(1, 9)]
    with pytest.raises(ValueError, match=r"lora\.rank was 2, now 3"):
        train(
            resumable(tmp_path, "run", resume=True, lora=LoRA(rank=3)), console=Console(quiet=True)
        )


def lasting(rows):
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_bytes", "mfu")}
        for row in rows
    ]


@slow
def test_a_reward_model_comes_back(tmp_path):
    config = Reward(
        out=tmp_path / "run", model=model_file(tmp_path), batch_size=4, lora=LoRA(rank=2),
        **SHARED | {"steps": 3},
    )  # fmt: skip
    result = train(config, console=Console(quiet=True))
    found, again = load_reward_model(result.model)
    assert found.d_model == MODEL.d_model
    tokens, sizes = jnp.asarray([TOKENIZER.encode("?a")]), jnp.asarray([3])
    ours = sequence_scores(result.policy, MODEL, tokens, sizes)
    assert difference(sequence_scores(again, MODEL, tokens, sizes), ours) < 1e-6
    assert difference(ours, jnp.zeros(1)) > 0
    with pytest.raises(ValueError, match=r"no value_head\.npz"):
        load_reward_model(tmp_path)


_REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
_PAIRS = {*_REWARDS, "rewards/accuracies", "logps/chosen", "logps/rejected"}
TRL_NAMES = {  # what TRL's trainers call what they log
    "sft": {"entropy"},
    "reward": {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"},
    "dpo": _PAIRS, "gdpo": _PAIRS, "simpo": {*_PAIRS, "nll_loss"},
    "kto": {*_REWARDS, "kl", "logps/chosen", "logps/rejected"},
    "orpo": {*_PAIRS, "nll_loss", "log_odds_ratio", "log_odds_chosen"},
}  # fmt: skip


@slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_the_synthetic_set(tmp_path, method):
    config = METHODS[method](
        out=tmp_path / "run", model=model_file(tmp_path), batch_size=4, lora=LoRA(rank=2),
        **SHARED | {"steps": 2},
    )  # fmt: skip
    rows = train(config, console=Console(quiet=True)).rows
    assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
    assert {*TRL_NAMES[method], "loss", "grad_norm", "lr"} <= set(rows[-1])
