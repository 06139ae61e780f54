"""The tour's stage of many devices: one small model, trained under every strategy, eight devices.

The devices are emulated by one CPU, so nothing here is fast and everything is exact: the loss
curves lie on one another, and the census shows what each strategy would send on real links. The
stage runs in a process of its own, because a process decides once how many devices it has.

    python -m jaxinfra tour --only parallel
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxinfra.errors import UserError
from jaxinfra.tour.shell import Tour

DEVICES = 8
ROWS, LENGTH = 8, 32
# name: mesh, other fields of Strategy, parts that are accumulated
STRATEGIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "one device": ("", {}, 1),
    "data": ("dp=8", {}, 1),
    "ZeRO-2": ("dp=8", {"zero": 2}, 1),
    "ZeRO-3 (FSDP)": ("fsdp=8", {}, 1),
    "tensor and data": ("tp=4,dp=2", {}, 1),
    "context (ring)": ("cp=8", {}, 1),
    "pipeline (1F1B)": ("pp=4,dp=2", {"schedule": "1f1b"}, 4),
    "pipeline, tensor, FSDP": ("pp=2,tp=2,fsdp=2", {"schedule": "eager-1f1b"}, 4),
}


def stage(tour: Tour) -> None:
    """Runs the strategies and writes curves, collectives and a schedule into the report."""
    section = tour.report.section("One model on eight devices")
    names = list(STRATEGIES)[: 3 if tour.quick else None]
    steps = 3 if tour.quick else 20
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "runs.json"
        for name in names:
            tour.console.print(f"{name}: {STRATEGIES[name][0] or 'the reference'}", highlight=False)
        done = subprocess.run(
            [sys.executable, "-m", "parallel.tour", str(out), str(steps), *names],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"parallel: the emulated run failed: {done.stderr.strip()[-300:]}")
        runs = json.loads(out.read_text())
    _report(section, runs)
    _schedules(section)
    if not tour.quick:
        _planned(section)
    section.note(
        "With jaxinfra[tpu] installed, `jaxinfra aot llama-3.1-70b --chip v5p --count 256 --mesh "
        "fsdp=64,tp=4` compiles such a step on this machine and tells its memory and collectives."
    )


def _report(section: Any, runs: dict[str, dict]) -> None:
    reference = np.array(runs["one device"]["losses"])
    section.text(
        f"The same model and batches ({ROWS} rows of {LENGTH} bytes) under {len(runs) - 1} "
        "strategies, in float32. What differs is where arrays lie and what is sent."
    )
    section.table(
        "Against one device, and what a device sends in a step",
        ("strategy", "mesh", "largest difference of a loss", "collectives a step", "KiB sent",
         "KiB of state"),
        [
            (name, run["mesh"] or "one device",
             float(np.max(np.abs(np.array(run["losses"]) / reference - 1))),
             ", ".join(f"{n} {op}" for op, n in run["collectives"].items()) or "none",
             run["sent"] / 1024, run["state"] / 1024)
            for name, run in runs.items()
        ],
    )  # fmt: skip
    fig = Figure(figsize=(8, 3.5), layout="constrained")
    ax = fig.subplots()
    for width, (name, run) in zip(np.linspace(9, 1.2, len(runs)), runs.items(), strict=True):
        ax.plot(run["losses"], linewidth=float(width), label=name, solid_capstyle="butt")
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats a byte")
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
    section.figure("Every strategy's loss; thinner lines are drawn over thicker ones", fig)


def _schedules(section: Any) -> None:
    from parallel.pipeline.draw import figure
    from parallel.pipeline.schedule import NAMES, make
    from parallel.pipeline.simulate import simulate

    P, M = 4, 8
    found = {name: simulate(make(name, P, M)) for name in NAMES}
    section.table(
        f"Pipeline schedules, {P} stages and {M} microbatches; a backward takes twice a forward",
        ("schedule", "bubble", "bubble in one program", "inputs kept, at most"),
        [(n, s.bubble, s.lockstep_bubble, max(s.stash)) for n, s in found.items()],
    )
    for name in ("1f1b", "zb-h1"):
        section.figure(
            "Forward blue, backward green, weight gradients orange", figure(make(name, P, M))
        )


def _planned(section: Any) -> None:
    from jaxinfra.hardware import chips
    from jaxinfra.model import presets
    from parallel.footprint import total
    from parallel.plan import plan

    found = plan(presets.find("llama-3.1-70b"), chips.find("v5p"), 256, 2**22, 4096)
    section.table(
        f"Llama 70B on 256 v5p, 4 Mi tokens a step: the first of {len(found.fitting)} meshes that "
        f"fit, of {len(found.fitting) + len(found.rejected)}; predicted, not run",
        ("mesh", "GB a chip", "seconds a step", "FLOP utilisation"),
        [(p.mesh, total(p.memory) / 1e9, p.seconds, p.mfu) for p in found.fitting[:5]],
    )


def _run(name: str, steps: int) -> dict[str, Any]:
    """Losses of a strategy and the census of its step."""
    import jax

    from jaxinfra.model import params, presets
    from jaxinfra.train.config import OptimizerConfig
    from jaxinfra.train.optimizer import make_optimizer, schedule
    from jaxinfra.train.step import TrainState, make_step
    from parallel.census import census, totals
    from parallel.mesh import shardings
    from parallel.train import Strategy, build

    config = presets.find("tiny").replace(num_layers=4, d_model=64, num_heads=8, num_kv_heads=4,
                                          head_dim=8, d_ff=128)  # fmt: skip
    recipe = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    optimizer = make_optimizer(recipe, steps)
    state = TrainState.create(params.init(jax.random.key(0), config), optimizer)
    mesh, fields, accumulate = STRATEGIES[name]
    if mesh:
        layout, step, specs = build(
            Strategy(mesh, **fields), config, optimizer, dtype=np.dtype("float32"),
            accumulate=accumulate,
        )  # fmt: skip
        state = jax.device_put(state, shardings(layout.mesh, specs))
    else:
        rate = schedule(recipe, steps)
        step = make_step(config, optimizer, rate, dtype=np.dtype("float32"))
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    rng, losses = np.random.default_rng(0), []
    first = jax.devices()[0]
    kept = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
        if shard.device == first
    )  # fmt: skip
    program = None
    for _ in range(steps):
        starts = rng.integers(0, len(text) - LENGTH - 1, ROWS)
        batch = {"tokens": text[starts[:, None] + np.arange(LENGTH + 1)]}
        if program is None:
            program = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
        state, metrics = program(state, batch)
        losses.append(float(metrics["loss"]))
    found = census(program, at_least=64)
    return {
        "mesh": mesh, "losses": losses, "state": kept, "sent": sum(c.sent for c in found),
        "collectives": {op: n for op, (n, _) in totals(found).items()},
    }  # fmt: skip


def main() -> None:
    """Runs the strategies named on eight emulated devices and writes what came out as JSON."""
    from parallel.mesh import emulate

    emulate(DEVICES)
    out, steps, *names = sys.argv[1:]
    Path(out).write_text(json.dumps({name: _run(name, int(steps)) for name in names}))


if __name__ == "__main__":
    main()
