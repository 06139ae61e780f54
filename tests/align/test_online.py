"""Whole runs by reward: killed and resumed to the bit, recorded and shown, refused where wrong."""

import io
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tyro
from rich.console import Console

from align import online, rollouts_page
from align.commands import align
from align.online_commands import GRPO, PPO, RLOO
from align.system.config import SystemConfig
from jaxinfra.train.metrics import read_metrics
from tests.align import killed
from tests.align.tiny import equal_bits, params

ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_NUMPY_DTYPE_PROMOTION": "strict",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_layer(monkeypatch):
    monkeypatch.setattr(online, "tiny", killed.small)


def quiet(config):
    return online.train(config, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """An asynchronous run: its folder and its last state."""
    out = tmp_path_factory.mktemp("live") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "tiny", killed.small)
        state = quiet(killed.config("live", out, records=1))
    return out, state


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["jit", "host", "replay"])
def test_killed_and_resumed_is_never_killed(loop, live, tmp_path):
    """k steps, SIGKILL some steps later, resume, to 2k: the state's bits, and a line a step."""
    folder, live_state = live
    schedule = [folder / "schedule.jsonl"] if loop == "replay" else []
    whole = quiet(killed.config(loop, tmp_path / "whole", *schedule))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.align.killed", loop, str(out), *map(str, schedule)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(read_metrics(out / "metrics.jsonl")) == killed.KILLED
    resumed = quiet(killed.config(loop, out, *schedule, resume=True))
    assert equal_bits(resumed, whole)
    assert int(whole.step) == killed.STEPS and float(whole.kl.coef) != pytest.approx(0.01, rel=1e-7)
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, killed.STEPS + 1))
    if loop == "replay":
        assert equal_bits(whole, live_state)
        ours, theirs = (path.read_text() for path in (out / "schedule.jsonl", schedule[0]))
        assert theirs.startswith(ours)


@pytest.mark.slow
def test_a_live_run_leaves_its_metrics_records_and_model(live):
    out, state = live
    rows = read_metrics(out / "metrics.jsonl")
    assert len(rows) == killed.STEPS and max(row["staleness/max"] for row in rows) <= 2
    for name in (
        "reward",
        "reward_std",
        "kl",
        "entropy",
        "completions/mean_length",
        "grad_norm",
        "sampling/sampling_logp_difference/max",
        "rewards/chain_sum/mean",
        "step_time",
    ):
        assert all(np.isfinite(row[name]) for row in rows), name
    text = rollouts_page.write(out).read_text()
    assert text.count("<details") == killed.STEPS and "token " in text
    config = killed.config("host", out, policy=out / "model")
    at = online.setting(config)
    assert equal_bits(online.first_params(config, at), state.trained.policy)


def test_a_run_is_neither_begun_twice_nor_resumed_without_one(live, tmp_path):
    out, _ = live
    with pytest.raises(ValueError, match="add --resume"):
        quiet(killed.config("live", out))
    with pytest.raises(ValueError, match="holds no run to resume"):
        quiet(killed.config("host", tmp_path, resume=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: GRPO(loop="replay"), "come together"), (lambda: GRPO(records=1), "--loop host"),
     (lambda: RLOO(rl=killed.CONFIG), "choose one of rloo"), (lambda: PPO(steps=0), "give 1 or"),
     (lambda: GRPO(problems=8), "give more problems"), (lambda: GRPO(warm_steps=-1), "negative"),
     (lambda: GRPO(loop="live", system=SystemConfig(max_staleness=1)), "sequence_truncate")],
)  # fmt: skip
def test_configurations_without_a_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.slow
def test_the_commands_flags_and_plan(capsys):
    flags = "grpo --easy --dry-run --rl.prompts 4 --rl.group-size 4 --problems 16 --loop live"
    command = tyro.cli(
        align, args=[*flags.split(), "--system.workers", "3"], return_unknown_args=False
    )
    assert command is None
    told = capsys.readouterr().out
    assert "grpo: 4 prompts x 4 answers a step" in told and "workers: 3" in told
    count = sum(leaf.size for leaf in jax.tree.leaves(params()))
    assert "the step in one program" in told and f"parameters: {count:,}" in told
    with pytest.raises(SystemExit):
        tyro.cli(align, args=["ppo", "--rl.nothing", "1"])
