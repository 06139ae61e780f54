"""A whole run: it learns, stops when asked, and goes on as if it had never stopped."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import types

import pytest
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.loading import load
from jaxinfra.train import loop
from jaxinfra.train import run as run_module
from jaxinfra.train.config import OptimizerConfig, TrainConfig
from jaxinfra.train.metrics import read_metrics
from tests.jaxinfra.train.tiny import DENSE, equal_bits

CHIP = types.SimpleNamespace(flops={"float32": 1e10})
VARYING = ("tokens_per_s", "memory_bytes", "mfu")
# Runs of the same shapes share their compiled programs.
CACHED = {
    name: functools.cache(getattr(loop, name))
    for name in ("make_optimizer", "schedule", "make_step", "make_evaluation")
}


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "detect", lambda: CHIP)
    for name, function in CACHED.items():
        monkeypatch.setattr(loop, name, function)
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i * i}\n" for i in range(400)))
    config = DENSE.replace(vocab_size=320, max_seq_len=256)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))


def settings(tmp_path, out="run", **changes) -> TrainConfig:
    return TrainConfig(
        data=str(tmp_path / "text.txt"), model=str(tmp_path / "config.json"), out=tmp_path / out,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        **{"steps": 8, "batch_size": 4, "seq_len": 16, "log_every": 2, "sample_every": 0,
           "eval_every": 3, "checkpoint_every": 100, **changes},
    )  # fmt: skip


def run(config, **options):
    return loop.train(config, console=Console(quiet=True), **options)


def lasting(rows):
    return [{k: v for k, v in row.items() if k not in VARYING} for row in rows]


def stop_at(step: int, number=signal.SIGINT):
    return lambda row: os.kill(os.getpid(), number) if row["step"] == step else None


@pytest.fixture
def whole(tmp_path):
    """A run of 8 steps that nothing stopped."""
    return run(settings(tmp_path, "whole"))


def test_a_run_leaves_a_model_metrics_and_checkpoints(tmp_path, whole):
    assert [row["step"] for row in whole.rows] == list(range(1, 9))
    assert whole.rows[-1]["loss"] < whole.rows[0]["loss"] - 0.3
    assert [row["step"] for row in whole.rows if "validation_nll" in row] == [3, 6, 8]
    for row in whole.rows:
        assert row["tokens"] == 64 and row["skipped"] == 0
    assert {"tokens_per_s", "memory_bytes", "mfu"} <= whole.rows[-1].keys()
    model = load(whole.model)
    assert equal_bits(model.params, whole.state.params)
    assert model.tokenizer.encode("héllo") == whole.tokenizer.encode("héllo")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_it_gives_the_bits_of_a_run_that_was_not(tmp_path, whole, number):
    before = signal.getsignal(signal.SIGINT)
    stopped = run(settings(tmp_path), on_row=stop_at(2, number))
    done = int(stopped.state.step)
    assert stopped.model is None and 2 <= done < 8
    assert [row["step"] for row in stopped.rows] == list(range(1, done + 1))
    resumed = run(settings(tmp_path, resume=True))
    assert equal_bits(resumed.state, whole.state)
    assert lasting(resumed.rows) == lasting(whole.rows)
    assert signal.getsignal(signal.SIGINT) is before


_SCRIPT = """
    import os, signal, sys, types
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from jaxinfra.train import loop
    from tests.jaxinfra.train.test_loop import CHIP, settings, stop_at
    from pathlib import Path
    loop.detect = lambda: CHIP
    last = int(sys.argv[2])
    loop.train(settings(Path(sys.argv[1]), resume=last == 0), on_row=stop_at(last))
"""


@pytest.mark.slow
def test_processes_that_follow_one_another_give_the_same_bits(tmp_path, whole):
    for last in (3, 0):
        command = [sys.executable, "-c", textwrap.dedent(_SCRIPT), str(tmp_path), str(last)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = "with --resume goes on" if last else "the model is in"
        assert said in done.stdout
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lasting(rows) == lasting(whole.rows)
    assert equal_bits(load(tmp_path / "run" / "model").params, whole.state.params)
    assert equal_bits(run(settings(tmp_path, resume=True)).state, whole.state)


def test_that_check_sees_a_run_whose_order_of_data_begins_anew(tmp_path, whole, monkeypatch):
    run(settings(tmp_path), on_row=stop_at(2))
    ahead = run_module._ahead
    monkeypatch.setattr(
        run_module, "_ahead", lambda data, first, last: ahead(data, 0, last - first)
    )
    assert not equal_bits(run(settings(tmp_path, resume=True)).state, whole.state)


def test_rows_of_steps_beyond_the_checkpoint_are_written_anew(tmp_path, whole):
    run(settings(tmp_path), on_row=stop_at(2))
    file = tmp_path / "run" / "metrics.jsonl"
    with file.open("a") as stream:  # as if it had been killed two steps after its checkpoint
        stream.write('{"step": 7, "loss": 0.0}\n{"step": 8, "lo')
    resumed = run(settings(tmp_path, resume=True))
    assert lasting(resumed.rows) == lasting(whole.rows)


def test_the_device_has_a_step_to_do_while_metrics_are_fetched(tmp_path, monkeypatch):
    events = []
    make_step = loop.make_step

    def watched(*args, **options):
        step = make_step(*args, **options)

        def call(state, batch):
            events.append("step")
            return step(state, batch)

        return call

    monkeypatch.setattr(loop, "make_step", watched)
    run(settings(tmp_path, eval_every=0), on_row=lambda row: events.append(row["step"]))
    for number in range(2, 7):
        assert events[: events.index(number)].count("step") == number + 2


def test_another_run_is_neither_overwritten_nor_mixed_up(tmp_path, whole):
    with pytest.raises(UserError, match=r"holds a run; add --resume .* another --out"):
        run(settings(tmp_path, "whole"))
    with pytest.raises(UserError, match=r"is at step \d+; give --steps \d+ or more"):
        run(settings(tmp_path, "whole", resume=True, steps=1))
    (tmp_path / "other" / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError, match=r"other: holds no run to resume"):
        run(settings(tmp_path, "other", resume=True))
    thesis = tmp_path / "project" / "model" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(UserError, match=r"holds a folder `model`, which this run would replace"):
        run(settings(tmp_path, "project"))
    assert thesis.read_text() == "years of work"
    with pytest.raises(UserError, match=r"batch\.batch_size was 4, now 8"):
        run(settings(tmp_path, "whole", resume=True, batch_size=8))
    (tmp_path / "text.txt").write_text("something else " * 200)
    with pytest.raises(UserError, match=r"data\.sha256 was"):
        run(settings(tmp_path, "whole", resume=True))


@pytest.mark.slow
def test_more_steps_may_be_asked_for_and_the_model_is_replaced(tmp_path, whole):
    longer = run(settings(tmp_path, "whole", resume=True, steps=10))
    assert [row["step"] for row in longer.rows] == list(range(1, 11))
    assert equal_bits(load(longer.model).params, longer.state.params)
    again = run(settings(tmp_path, "whole", resume=True, steps=10))  # nothing is left to do
    assert equal_bits(again.state, longer.state)


def test_finetuning_starts_from_a_model_and_its_tokenizer(tmp_path, whole):
    tuned = run(settings(tmp_path, "tuned", finetune=str(whole.model), steps=2))
    assert tuned.rows[0]["loss"] < whole.rows[2]["loss"]
    assert tuned.tokenizer.encode("abc") == whole.tokenizer.encode("abc")


def test_a_sample_is_written_by_the_model(tmp_path):
    rows = run(settings(tmp_path, steps=2, sample_every=1, eval_every=0, prompt="12 and ")).rows
    assert all(row["sample"].startswith("12 and ") for row in rows)
    long = "12 and " * 30  # leaves room for fewer tokens than a sample has
    rows = run(settings(tmp_path, "b", steps=1, sample_every=1, eval_every=0, prompt=long)).rows
    assert rows[0]["sample"].startswith(long)


def test_the_first_parameters_follow_the_seed(tmp_path):
    one, same, other = (loop.model_of(settings(tmp_path, seed=seed))[2]() for seed in (0, 0, 1))
    assert equal_bits(one, same) and not equal_bits(one, other)


def test_bad_wishes_are_refused_before_anything_is_written(tmp_path):
    for changes, message in (
        ({"batch_size": 6, "accumulate": 4}, "batch_size=6 is not a multiple of accumulate=4"),
        ({"steps": 0}, "steps=0: give 1 or more"),
        ({"validation": 1.0}, "validation=1.0"),
        ({"seq_len": 512}, "seq_len=512 exceeds the model's max_seq_len=256"),
        ({"finetune": "nowhere"}, "nowhere: no such file"),
        ({"sample_every": 1, "prompt": "x" * 300}, "prompt: 30. tokens leave no room"),
        ({"seed": -1}, "seed=-1"),
        ({"z_loss": float("nan")}, "z_loss=nan"),
        ({"validation": float("nan")}, "validation=nan"),
    ):
        with pytest.raises(UserError, match=message):
            run(settings(tmp_path, **changes))
        assert not (tmp_path / "run").exists(), changes


@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "final_fraction", "b1", "b2", "eps", "clip_norm"]
)
def test_no_setting_of_the_optimizer_may_be_nan(name):
    with pytest.raises(UserError, match=f"{name}=nan"):
        OptimizerConfig(**{name: float("nan")})


def test_the_configuration_is_read_without_jax():
    script = "import sys, jaxinfra.train.config; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
