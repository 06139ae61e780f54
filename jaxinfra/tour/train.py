"""The tour's second stage: a byte model learns Python's standard library in about a minute."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import jax
from matplotlib.figure import Figure

from jaxinfra.loading import load
from jaxinfra.tour.shell import Tour
from jaxinfra.train.config import OptimizerConfig, TrainConfig
from jaxinfra.train.loop import Result, train

STEPS = 120


def stage(tour: Tour) -> None:
    """Trains the preset `tiny`, draws its loss, and leaves the model for the stages after."""
    section = tour.report.section("A model trained from nothing")
    config = TrainConfig(
        steps=STEPS, batch_size=8, seq_len=128, eval_every=STEPS // 2, log_every=10,
        sample_every=STEPS // 2, checkpoint_every=STEPS,
        optimizer=OptimizerConfig(name="muon", learning_rate=5e-3),
    )  # fmt: skip
    if tour.quick:
        config = dataclasses.replace(config, steps=8, batch_size=2, seq_len=64, eval_every=4,
                                     sample_every=8, checkpoint_every=8)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, out=Path(folder) / "run")
        result = train(config, console=tour.console)
        assert result.model is not None
        tour.left["trained"] = load(result.model)
    speed = next((r["tokens_per_s"] for r in reversed(result.rows) if "tokens_per_s" in r), None)
    last = result.rows[-1]
    size = sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
    section.text(
        f"{size / 1e6:.2f} M parameters, "
        f"{config.batch_size} x {config.seq_len} bytes a step, {config.steps} steps of "
        f"{config.optimizer.name}, on the source of Python's standard library."
    )
    section.table(
        "After the last step",
        ("what", "value"),
        [
            ("loss, nats a byte", last["loss"]),
            ("held-out loss, nats a byte", last.get("validation_nll", "not taken")),
            ("training speed, tokens/s", speed if speed is not None else "not taken"),
            ("steps skipped as not finite", last["skipped"]),
        ],
    )
    section.figure("Loss in nats a byte; chance is ln 256 = 5.55", _curve(result))
    for row in result.rows:
        if "sample" in row:
            section.text(f"What it writes after step {row['step']}:")
            section.verbatim(row["sample"])


def _curve(result: Result) -> Figure:
    fig = Figure(figsize=(8, 3.5), layout="constrained")
    ax = fig.subplots()
    ax.plot([row["step"] for row in result.rows], [row["loss"] for row in result.rows],
            label="training")  # fmt: skip
    held = [(row["step"], row["validation_nll"]) for row in result.rows if "validation_nll" in row]
    if held:
        ax.plot(*zip(*held, strict=True), "o-", label="held out")
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats a byte")
    ax.legend()
    ax.grid(alpha=0.3)
    return fig
