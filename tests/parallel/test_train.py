"""Whole training runs on a mesh: the loop's losses, resumed on another mesh."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.train import loop
from jaxinfra.train.config import OptimizerConfig, TrainConfig
from parallel import commands
from parallel.mesh import emulate
from parallel.model import Options
from parallel.train import Strategy, train
from tests.parallel import tiny

STEPS = 4


def config(folder, **changes):
    shape = folder / "config.json"
    shape.write_text(json.dumps(tiny.LLAMA.replace(vocab_size=320, bos_id=None).to_hf()))
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    made = TrainConfig(
        data=str(text), out=folder / "run", model=str(shape), steps=STEPS, batch_size=8, seq_len=16,
        sample_every=0, eval_every=0, checkpoint_every=2, dtype="float32", prompt="the",
        optimizer=OptimizerConfig(warmup_steps=1, eps=1e-3),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture(autouse=True)
def quickly(tmp_path, monkeypatch):
    """A token cache of its own, and programs that take little time to compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def losses(result):
    return [row["loss"] for row in result.rows]


@pytest.mark.slow
def test_a_run_on_a_mesh_is_the_run_of_one_device_and_resumes_on_another_mesh(tmp_path):
    for name in ("one", "mesh"):
        (tmp_path / name).mkdir()
    quiet = Console(quiet=True)
    one = loop.train(config(tmp_path / "one"), console=quiet)
    there = config(tmp_path / "mesh", accumulate=2)
    half = dataclasses.replace(there, steps=STEPS)
    found = train(half, Strategy("pp=2,dp=2,tp=2", zero=2, schedule="zb-h1"), console=quiet)
    assert losses(found) == pytest.approx(losses(one), rel=1e-5)
    assert found.model is not None
    more = dataclasses.replace(there, steps=STEPS + 2, resume=True)
    resumed = train(more, Strategy("fsdp=4,tp=2"), console=quiet)
    assert [row["step"] for row in resumed.rows] == list(range(1, STEPS + 3))
    assert losses(resumed)[:STEPS] == losses(found)


@pytest.mark.slow
def test_a_run_in_half_precision_resumes_with_its_scale(tmp_path):
    quiet = Console(quiet=True)
    there = config(tmp_path, steps=2)
    half = train(there, Strategy("dp=2", zero=2, precision="float16"), console=quiet)
    assert [row["loss_scale"] for row in half.rows] == [2.0**15] * 2
    more = dataclasses.replace(there, steps=3, resume=True)
    found = train(more, Strategy("fsdp=2", precision="float16"), console=quiet)
    assert [row["step"] for row in found.rows] == [1, 2, 3]
    assert int(found.state.opt_state.loss.clean) == 3 and int(found.state.skipped) == 0


@pytest.mark.slow
def test_a_run_balances_its_experts_and_resumes_with_the_bias(tmp_path):
    quiet = Console(quiet=True)
    there = config(tmp_path, steps=40, checkpoint_every=40, router_bias_update_rate=1e-3)
    there = dataclasses.replace(there, eval_every=40, validation=0.1)
    shape = tiny.UNBALANCED.replace(vocab_size=320, bos_id=None)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
    found = train(there, Strategy("dp=2,ep=2"), console=quiet)
    over = [row["max_violation"] for row in found.rows]
    assert np.mean(over[-5:]) < 1.2, over  # without the bias about 2
    more = dataclasses.replace(there, steps=41, resume=True, eval_every=0)
    resumed = train(more, Strategy("fsdp=2,tp=2"), console=quiet)
    moved = np.abs(resumed.state.opt_state.bias - found.state.opt_state.bias)
    assert moved.max() == pytest.approx(1e-3, rel=1e-2) and resumed.rows[-1]["step"] == 41
    assert resumed.rows[-1]["max_violation"] < 1.2
    without = dataclasses.replace(more, router_bias_update_rate=0.0)
    with pytest.raises(UserError, match="router_bias_update_rate was"):
        train(without, Strategy("dp=4"), console=quiet)


def test_layers_are_written_out_on_a_gpu_unless_there_are_many(monkeypatch):
    assert loop.layers_a_turn(0, 28) == 1 and loop.layers_a_turn(4, 2) == 2
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loop.layers_a_turn(0, 28) == 28 and loop.layers_a_turn(0, 80) == 1
    assert loop.layers_a_turn(4, 28) == 4


def test_bad_strategies_are_told():
    with pytest.raises(UserError, match="fsdp in the mesh is ZeRO-3"):
        Strategy(zero=3)
    with pytest.raises(UserError, match="choose one of none, matmuls, attention, full, offload"):
        Options(remat="some")
    with pytest.raises(UserError, match="give 1 to 512"):
        emulate(1000)
    with pytest.raises(UserError, match="dp=1 is one device"):
        loop.train(TrainConfig(router_bias_update_rate=1e-3))
    with pytest.raises(UserError, match="router_bias_update_rate=2: give one in"):
        TrainConfig(router_bias_update_rate=2)


def test_the_command_draws_schedules(capsys):
    commands.schedule("1f1b", stages=2, microbatches=2)
    told = capsys.readouterr().out
    assert "stage 1 | .  F0 B0 F1 B1" in told and "bubble 33.3%" in told
    assert "inputs kept [2, 1]" in told
