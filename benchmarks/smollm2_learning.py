"""SmolLM2-135M-Instruct learns two tasks of reasoning-gym by GRPO: before and after, held out.

    python -m benchmarks.smollm2_learning OUT                   # ten minutes of one H200 at most
    python -m benchmarks.smollm2_learning OUT --seconds 60 --steps 2 --prompts 2 --held-out 8

The questions are reasoning-gym's `chain_sum` and `products`, two or three numbers of one digit,
after three worked examples in the chat, and what trains is reasoning-gym's score: 1 for the answer
alone, a small share for the answer among other words. All parameters are trained, from the weights
that `jaxinfra pull smollm2-135m` finds; nothing is learnt from answers. A rollout is one program,
the text is scored on the host, score and update are a program each, and both tasks and all seeds
use the same three programs. What counts is the share of right answers on questions held out, drawn
at temperature 1 and greedy, with intervals; seeds take turns through the tasks, so that where time
ends whole seeds are missing and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align.config import RLConfig
from align.host_loop import HostLoop
from align.rewards import Answers
from align.rollout import rollout
from align.step import RLState, create
from align.text_tasks import find
from jaxinfra import load
from jaxinfra.files import write_file
from jaxinfra.generate import Sampling
from jaxinfra.loading import Model
from jaxinfra.measure import Entry, environment, write
from jaxinfra.model.params import Params
from jaxinfra.train.config import OptimizerConfig

EXAMPLES, PROBLEMS, NEW, EVERY, SHOWN = 3, 4096, 8, 25, 12


@dataclasses.dataclass(frozen=True)
class Questions:
    """A task's, to learn from and held out; no question is in both."""

    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]  # each question once
    answers: list[str]
    scorer: Any

    @classmethod
    def of(cls, name: str, model: Model, width: int, held_out: int) -> Questions:
        task = find(name)
        rows, answers = task.problems(PROBLEMS, model.tokenizer, seed=0, examples=EXAMPLES)
        rows["prompts"] = np.pad(rows["prompts"], ((0, 0), (0, width - rows["prompts"].shape[1])))
        _, first, question = np.unique(
            rows["prompts"], axis=0, return_index=True, return_inverse=True
        )
        order = np.random.default_rng(0).permutation(len(first))
        kept = order[: min(held_out, len(first) // 5)]
        train = np.flatnonzero(~np.isin(question.ravel(), kept))
        train = np.resize(train, PROBLEMS)  # as many for each task: the programs are the same
        part = lambda index: {k: a[index] for k, a in rows.items()}  # noqa: E731
        return cls(part(train), part(first[kept]), answers, task.reward(answers, model.tokenizer))


@dataclasses.dataclass(frozen=True)
class Tried:
    """Answers to the questions held out: whether each is right, and some in words."""

    right: np.ndarray  # bool [M]
    said: list[str]


@dataclasses.dataclass
class Learnt:
    """One seed's run on one task."""

    rewards: list[float]
    right: list[float]  # share of the step's answers
    on_the_way: dict[int, float]  # greedy, held out, after so many steps
    before: dict[str, Tried]  # by how answers are chosen
    after: dict[str, Tried]
    seconds: float


class Bench:
    """The programs, for both tasks and all seeds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.begun, self.args = time.perf_counter(), args
        self.model = load(args.model)
        self.config = RLConfig(
            prompts=args.prompts, group_size=8, max_new_tokens=NEW,
            stop_id=self.model.tokenizer.eos_ids[0], remat="matmuls",
            optimizer=OptimizerConfig(
                learning_rate=args.rate, warmup_steps=5, final_fraction=1.0, weight_decay=0.0,
                b2=0.99,
            ),
        )  # fmt: skip
        self.dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        widths = [
            find(t).problems(64, self.model.tokenizer, examples=EXAMPLES)[0]["prompts"].shape[1]
            for t in args.tasks
        ]
        width = -(-(max(widths) + 2) // 16) * 16
        self.questions = {t: Questions.of(t, self.model, width, args.held_out) for t in args.tasks}
        first = self.questions[args.tasks[0]]
        self.loop = HostLoop(
            self.config, self.model.config, first.train, [first.scorer], steps=args.steps,
            dtype=self.dtype,
        )  # fmt: skip
        self._choose = {
            "drawn": self._chooser(Sampling(temperature=1.0)),
            "greedy": self._chooser(Sampling(temperature=0.0)),
        }

    def _chooser(self, sampling: Sampling) -> Any:
        def answers(params: Params, prompts: jax.Array, lengths: jax.Array) -> Any:
            params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)
            return rollout(
                params, self.model.config, prompts, lengths, jax.random.key(7), group_size=1,
                max_new_tokens=NEW, sampling=sampling, stop_id=self.config.stop_id,
            )  # fmt: skip

        return jax.jit(answers)

    def passed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begun

    def compile(self) -> None:
        """One step and one round of questions, thrown away: from here on nothing compiles."""
        task = self.args.tasks[0]
        state, metrics, _ = self.loop.watched_step(create(self.config, self.model.params))
        for how in self._choose:
            self.tried(task, state.trained.policy, how)
        print(f"loaded and compiled in {self.passed():.0f} s, "
              f"mismatch KL {metrics['mismatch_kl']:.1e}", flush=True)  # fmt: skip

    def tried(self, task: str, params: Params, how: str) -> Tried:
        """The questions held out, answered."""
        q = self.questions[task]
        r = self._choose[how](params, q.held_out["prompts"], q.held_out["lengths"])
        answers = Answers(jax.device_get(r), q.held_out)
        decode = self.model.tokenizer.decode
        return Tried(
            np.asarray(q.scorer(answers)) == 1.0,
            [decode(s.answer) for s in answers.samples[:SHOWN]],
        )  # fmt: skip

    def learn(self, task: str, seed: int, steps: int, until: float) -> Learnt:
        """A run of `steps`, or of fewer where `until` seconds since the start have passed."""
        begun, q = time.perf_counter(), self.questions[task]
        self.loop.problems, self.loop.scorers = dict(q.train), (q.scorer,)
        state: RLState = create(self.config, self.model.params, seed=seed)
        policy = state.trained.policy
        found = Learnt([], [], {}, {h: self.tried(task, policy, h) for h in self._choose}, {}, 0.0)
        found.on_the_way[0] = float(found.before["greedy"].right.mean())
        for step in range(1, steps + 1):
            state, metrics, experience = self.loop.watched_step(state)
            found.rewards.append(metrics["reward"])
            right = 0.0 if experience is None else float(jnp.mean(experience.rewards == 1.0))
            found.right.append(right)
            if step % EVERY == 0 or step == steps:
                share = self.tried(task, state.trained.policy, "greedy").right.mean()
                found.on_the_way[step] = float(share)
                print(f"{task} seed {seed} step {step}: reward {metrics['reward']:.3f}, right "
                      f"{right:.3f}, held out {share:.3f}, {metrics['step_time']:.2f} s a step, "
                      f"{self.passed():.0f} s", flush=True)  # fmt: skip
            if self.passed() > until:
                break
        found.after = {h: self.tried(task, state.trained.policy, h) for h in self._choose}
        found.seconds = time.perf_counter() - begun
        return found


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    p, n = right / of, of
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def gain(runs: Sequence[Learnt], how: str) -> tuple[float, float, float]:
    """Right answers gained a question, mean over seeds: all, and a bootstrap over questions."""
    each = np.mean([r.after[how].right.astype(float) - r.before[how].right for r in runs], axis=0)
    draws = np.random.default_rng(0).integers(0, len(each), (2000, len(each)))
    low, high = np.quantile(each[draws].mean(axis=1), (0.025, 0.975))
    return float(each.mean()), float(low), float(high)


def entry(bench: Bench, task: str, runs: list[Learnt]) -> Entry:
    """The ledger's entry of a task; prints its table."""
    shares: dict[str, list[float]] = {}
    told: dict[str, Any] = {}
    for how in ("drawn", "greedy"):
        for when in ("after", "before"):
            right = [getattr(r, when)[how].right for r in runs]
            shares[f"{when}, {how}"] = [float(x.mean()) for x in right]
            bounds = [wilson(int(x.sum()), len(x)) for x in right]
            told[f"wilson {when}, {how}"] = [[round(b, 4) for b in pair] for pair in bounds]
            shown = "  ".join(
                f"{x.mean():.3f} ({low:.3f}-{high:.3f})"
                for x, (low, high) in zip(right, bounds, strict=True)
            )
            print(f"{task:14s} {when:6s} {how:6s} {shown}")
        told[f"gain {how}"] = [round(x, 4) for x in gain(runs, how)]
        print("{:14s} gain   {:6s} {:.3f} ({:.3f}-{:.3f})".format(task, how, *gain(runs, how)))
    q, args, steps = bench.questions[task], bench.args, [len(r.rewards) for r in runs]
    asked = [bench.model.tokenizer.decode(row[:n]) for row, n in
             zip(q.held_out["prompts"][:SHOWN], q.held_out["lengths"], strict=False)]  # fmt: skip
    return Entry(
        name=f"smollm2-learning-{task.replace('_', '-')}",
        claim=f"SmolLM2-135M-Instruct learns {task} by GRPO: right answers on "
              f"{len(q.held_out['lengths'])} questions held out",
        command="python -m benchmarks.smollm2_learning OUT",
        unit="of 1",
        samples={name: shares[name] for name in
                 ("after, drawn", "before, drawn", "after, greedy", "before, greedy")},
        ratio=None, interval=None, roofline=None, roof="a share has none; 1 is the most",
        inputs=f"{args.model}; two or three numbers of one digit, {EXAMPLES} worked examples in "
               f"the chat; {args.prompts} x 8 answers of at most {NEW} tokens a step, {steps} "
               f"steps, AdamW at {args.rate:g}, no divergence, {jnp.dtype(bench.dtype).name}; "
               f"seeds 0 to {len(runs) - 1}; questions of reasoning-gym 0.1.25, drawn here",
        mislead="before, the model also fails at the form of an answer, so not all of the gain is "
                "arithmetic; questions held out are of the same kind as those learnt; no peer was "
                "run; weights of a short name may be a 4-bit copy of the model",
        environment=environment(),
        extra=told | {
            "seconds": [round(r.seconds, 1) for r in runs], "all_seconds": round(bench.passed(), 1),
            "rewards": [np.round(r.rewards, 4).tolist() for r in runs],
            "right": [np.round(r.right, 4).tolist() for r in runs],
            "held_out_greedy_by_step": [r.on_the_way for r in runs],
            "samples": [
                {"question": text.strip().removesuffix("assistant").strip().splitlines()[-1],
                 "answer": q.answers[int(n)], "before": b, "after": a}
                for text, n, b, a in zip(asked, q.held_out["number"],
                                         runs[0].before["drawn"].said, runs[0].after["drawn"].said,
                                         strict=False)
            ],
        },
    )  # fmt: skip


def curves(found: dict[str, list[Learnt]]) -> bytes:
    """Right answers of each step, and greedy ones on the questions held out, a line a seed."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.5 * len(found), 3.2), layout="constrained")
    for ax, (task, runs) in zip(
        fig.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for seed, run in enumerate(runs):
            ax.plot(np.arange(1, len(run.right) + 1), run.right, color="C0", linewidth=0.6,
                    label="drawn, each step" if seed == 0 else None)  # fmt: skip
            steps, shares = zip(*run.on_the_way.items(), strict=True)
            ax.plot(steps, shares, color="C1", marker=".",
                    label="greedy, held out" if seed == 0 else None)  # fmt: skip
        ax.set(title=task, xlabel="step", ylabel="right answers", ylim=(0, 1))
        ax.legend()
    drawn = io.BytesIO()
    fig.savefig(drawn, format="svg")
    return drawn.getvalue()


def main(argv: list[str]) -> None:
    """All tasks seed by seed while there is time; entries, curves and a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2_learning")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=540.0, help="compilation included")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", type=lambda s: s.split(","), default=["chain_sum", "products"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=64, help="a step, 8 answers each")
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-5, help="of learning")
    args = parser.parse_args(argv)
    bench = Bench(args)
    bench.compile()
    found: dict[str, list[Learnt]] = {task: [] for task in args.tasks}
    longest = 0.0
    share = (args.seconds - 10 - bench.passed()) / (args.seeds * len(args.tasks))
    for seed in range(args.seeds):
        if seed and bench.passed() + longest * len(args.tasks) > args.seconds:
            print(f"no time for seed {seed}")
            break
        for task in args.tasks:
            found[task].append(bench.learn(task, seed, args.steps, bench.passed() + share))
        longest = max(runs[-1].seconds for runs in found.values())
        for task, runs in found.items():
            print(write(entry(bench, task, runs), args.out), flush=True)
    write_file(args.out / "smollm2-learning.svg", curves(found))
    print(f"{bench.passed():.0f} s in all")


if __name__ == "__main__":
    main(sys.argv[1:])
