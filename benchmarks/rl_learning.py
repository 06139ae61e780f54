"""Three tasks learnt by reward, by GRPO, RLOO and PPO, three seeds each.

    python -m benchmarks.rl_learning OUT            # two minutes on one H200
    python -m benchmarks.rl_learning OUT spell_backward:grpo chain_sum:ppo        # a part of it

A policy of two layers (75,000 parameters) sees some hundred batches of answers, until about half of
what it draws is right, and then learns from rewards alone: all steps one program, the seeds side by
side, and the nine programs in threads of their own, as most of the time goes to compiling them.
What counts is the mean reward of the last ten steps' answers, drawn at temperature 1; beside it
stand problems that were held out. Each pair has an entry of its own in OUT; the curves are drawn of
all entries there, so the parts of one table may be measured at different times.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from align.config import RLConfig
from align.online import tiny
from align.online_commands import WARM, WITH_CRITIC
from align.rollout import rollout
from align.step import create, make_run
from align.tasks import STOP, TASKS
from align.warm_start import make_warm_start
from jaxinfra.files import write_file
from jaxinfra.generate import Sampling
from jaxinfra.hardware.detect import usable_cpus
from jaxinfra.measure import Entry, environment, read_all, write
from jaxinfra.model import params as P
from jaxinfra.model.params import Params
from jaxinfra.train.config import OptimizerConfig

SEEDS, PROBLEMS, LAST = 3, 4096, 10
WARM_STEPS = {"chain_sum": 240, "spell_backward": 70, "number_sorting": 80}
STEPS = 400
# A rate that falls: Adam moves as far by the few answers that still differ as by many.
_RATE = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=5, final_fraction=0.1, weight_decay=0.0, b2=0.99
)
_GROUPED = RLConfig(prompts=64, group_size=8, epochs=2, minibatches=2, optimizer=_RATE)
ALGORITHMS = {
    "grpo": _GROUPED,
    "rloo": dataclasses.replace(_GROUPED, algorithm="rloo"),
    "ppo": dataclasses.replace(WITH_CRITIC, prompts=512, optimizer=_RATE),
}


@dataclasses.dataclass(frozen=True)
class Learnt:
    """Of each seed: rewards of all steps, and held-out means before and after."""

    rewards: np.ndarray  # [seed, step]
    before: np.ndarray  # of held-out problems, answers drawn
    after: np.ndarray
    greedy: np.ndarray
    seconds: float  # compilation included

    @property
    def final(self) -> np.ndarray:
        """Mean reward of the last steps."""
        return self.rewards[:, -LAST:].mean(axis=1)


@functools.cache
def problems(task: str) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The easy setting's: to learn from, and with other prompts, a fifth of all there are."""
    rows = TASKS[task].easy().problems(PROBLEMS, seed=0)
    _, prompt = np.unique(rows["prompts"], axis=0, return_inverse=True)
    out = np.random.default_rng(0).permutation(prompt.max() + 1)[prompt.ravel()] % 5 == 0
    part = lambda kept: {name: jnp.asarray(a[kept]) for name, a in rows.items()}  # noqa: E731
    return part(~out), part(out)


@functools.cache
def warm(task: str, seeds: int, steps: int) -> tuple[Any, Params]:
    """The shape, and a policy for each seed that has seen `steps` batches of answers."""
    rows, _ = problems(task)
    model = tiny(TASKS[task], rows["prompts"].shape[1] + rows["answer"].shape[1] + 1)
    start = make_warm_start(model, WARM, steps=steps, batch=64)

    def one(key: jax.Array) -> Params:
        begin, learn = jax.random.split(key)
        return start(P.init(begin, model), rows, learn)[0]

    keys = jax.random.split(jax.random.key(0), seeds)
    return model, jax.jit(jax.vmap(one))(keys)


def learn(task: str, algorithm: str, *, seeds: int, warm_steps: int, steps: int) -> Learnt:
    """A run of each seed, side by side in one program."""
    started = time.perf_counter()
    model, params = warm(task, seeds, warm_steps)
    rows, _ = problems(task)
    config = dataclasses.replace(
        ALGORITHMS[algorithm], stop_id=STOP, max_new_tokens=rows["answer"].shape[1] + 1
    )
    states = jax.vmap(lambda p, seed: create(config, p, seed=seed, steps=steps))(
        params, jnp.arange(seeds, dtype=jnp.uint32)
    )
    run = make_run(config, model, TASKS[task].reward, steps)
    ended, metrics = jax.jit(jax.vmap(run, in_axes=(0, None)))(states, rows)
    drawn, greedy = (_held_out(task, model, config, temperature) for temperature in (1.0, 0.0))
    policy = ended.trained.policy
    return Learnt(
        np.asarray(metrics["reward"]), drawn(params), drawn(policy), greedy(policy),
        time.perf_counter() - started,
    )  # fmt: skip


def _held_out(task: str, model: Any, config: RLConfig, temperature: float) -> Any:
    """A function of the seeds' parameters: each one's mean reward on problems held out."""
    _, rows = problems(task)

    def score(params: Params) -> jax.Array:
        r = rollout(
            params, model, rows["prompts"], rows["lengths"], jax.random.key(7), group_size=1,
            max_new_tokens=config.max_new_tokens, sampling=Sampling(temperature=temperature),
            stop_id=STOP,
        )  # fmt: skip
        return jnp.mean(TASKS[task].reward(r, rows))

    mapped = jax.jit(jax.vmap(score))
    return lambda params: np.asarray(mapped(params))


def entry(task: str, name: str, f: Learnt) -> Entry:
    """The ledger's entry of a task and an algorithm."""
    return Entry(
        name=f"rl-learning-{task.replace('_', '-')}-{name}",
        claim=f"{task} learnt by {name.upper()}: the mean reward of the last {LAST} steps' answers",
        command=f"python -m benchmarks.rl_learning OUT {task}:{name}",
        unit="of 1",
        samples={
            "after": f.final.tolist(), "after, greedy, held out": f.greedy.tolist(),
            "after, held out": f.after.tolist(), "before, held out": f.before.tolist(),
        },
        ratio=None, interval=None, roofline=None, roof="a reward has none; 1 is the most",
        inputs=f"{PROBLEMS} problems of the easy setting, a fifth of the different ones held out; "
               f"{WARM_STEPS[task]} supervised steps of 64, then {STEPS} steps of 512 answers; "
               f"{len(f.final)} seeds; a policy of two layers, float32",
        mislead=f"before and after are settings of this project, none is a peer; an easy setting "
                f"has few different problems, and the last steps' answers are to problems learnt "
                f"from; the worst seed ends at {f.final.min():.3f}, held out at "
                f"{f.after.min():.3f}",
        environment=environment(),
        extra={"rewards": np.round(f.rewards, 4).tolist(), "seconds": round(f.seconds, 1)},
    )  # fmt: skip


def curves(folder: Path) -> Figure:
    """Rewards by step of all entries in `folder`, a line for each seed."""
    there = {e.name: e.extra["rewards"] for e in read_all(folder) if "rewards" in e.extra}
    fig = Figure(figsize=(4 * len(TASKS), 3.2), layout="constrained")
    for ax, task in zip(fig.subplots(1, len(TASKS), squeeze=False)[0], TASKS, strict=True):
        for number, name in enumerate(ALGORITHMS):
            rewards = there.get(f"rl-learning-{task.replace('_', '-')}-{name}", [])
            for seed, row in enumerate(rewards):
                ax.plot(
                    np.arange(1, len(row) + 1), row, color=f"C{number}", linewidth=0.8,
                    label=name if seed == 0 else None,
                )  # fmt: skip
        ax.axhline(0.9, color="grey", linestyle=":", linewidth=0.8, label="0.9")
        ax.set(title=task, xlabel="step", ylabel="mean reward", ylim=(0, 1))
        ax.legend()
    return fig


def _tried(pair: tuple[str, str]) -> Learnt | Exception:
    """What was learnt, or why not: one failure leaves the others alone."""
    task, name = pair
    try:
        return learn(task, name, seeds=SEEDS, warm_steps=WARM_STEPS[task], steps=STEPS)
    except Exception as error:
        return error


def main(argv: Sequence[str]) -> None:
    """Runs all or some pairs; prints a line and writes an entry for each, then the curves."""
    every = [f"{task}:{name}" for task in TASKS for name in ALGORITHMS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_learning")
    parser.add_argument("out", type=Path, help="folder of the entries")
    parser.add_argument("pairs", nargs="*", metavar="TASK:ALGORITHM", help=", ".join(every))
    args = parser.parse_args(argv)
    if unknown := set(args.pairs) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(every)}")
    begun = time.perf_counter()
    asked = [(task, name) for task, _, name in (p.partition(":") for p in args.pairs or every)]
    with ThreadPoolExecutor(min(len(asked), usable_cpus())) as pool:
        tasks = list(dict.fromkeys(task for task, _ in asked))
        list(pool.map(lambda task: warm(task, SEEDS, WARM_STEPS[task]), tasks))
        for (task, name), f in zip(asked, pool.map(_tried, asked), strict=True):
            if isinstance(f, Exception):
                print(f"{task} {name}: {f!r}", flush=True)
                continue
            columns = {"first": f.rewards[:, 0], "final": f.final, "held out, before": f.before,
                       "after": f.after, "greedy": f.greedy}  # fmt: skip
            shown = "; ".join(f"{k} {' '.join(f'{x:.3f}' for x in v)}" for k, v in columns.items())
            print(f"{task:14s} {name:4s} {shown}; {f.seconds:.0f} s", flush=True)
            write(entry(task, name, f), args.out)
    drawn = io.BytesIO()
    curves(args.out).savefig(drawn, format="svg")
    write_file(args.out / "rl-learning.svg", drawn.getvalue())
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main(sys.argv[1:])
