"""SmolLM2-135M-Instruct learns two tasks of reasoning-gym by GRPO: before and after, held out.

    python -m benchmarks.smollm2_learning OUT                   # ten minutes of one H200 at most
    python -m benchmarks.smollm2_learning OUT --seconds 60 --steps 2 --prompts 2 --held-out 8

The questions are reasoning-gym's `chain_sum` and `products`, two or three numbers of one digit,
after three worked examples in the chat, and what trains is reasoning-gym's score: 1 for the answer
alone, a small share for the answer among other words. All parameters are trained, from the weights
that `jaxinfra pull smollm2-135m` finds; nothing is learnt from answers. A rollout is one program,
the text is scored on the host, score and update are a program each, and both tasks, all seeds and
the questions held out use the same three, as compiling one takes as long as two hundred steps. What
counts is the share of right answers to questions held out, eight drawn for each, with intervals;
seeds take turns through the tasks: where time ends, whole seeds are missing and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align.config import RLConfig
from align.host_loop import HostLoop, answers_of, generate
from align.step import RLState, create
from align.text_tasks import find
from jaxinfra import load
from jaxinfra.files import write_file
from jaxinfra.loading import Model
from jaxinfra.measure import Entry, environment, write
from jaxinfra.model.params import Params
from jaxinfra.train.config import OptimizerConfig

EXAMPLES, PROBLEMS, NEW, GROUP, EVERY, SHOWN = 3, 4096, 8, 8, 25, 12
_HELD_OUT = 2**31  # the seed of draws for questions held out


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
    """Answers to the questions held out."""

    right: np.ndarray  # [M], the share of right ones of each question's eight
    said: list[str]  # the first of some questions


@dataclasses.dataclass
class Learnt:
    """One seed's run on one task."""

    rewards: list[float]
    right: list[float]  # share of the step's answers
    on_the_way: dict[int, float]  # share of right answers, held out, after so many steps
    before: Tried
    after: Tried
    seconds: float


class Bench:
    """The programs, for both tasks and all seeds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.begun, self.args = time.perf_counter(), args
        self.model = load(args.model)
        self.config = RLConfig(
            prompts=args.prompts, group_size=GROUP, max_new_tokens=NEW,
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

    def passed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begun

    def compile(self) -> None:
        """One step, thrown away: from here on nothing compiles."""
        state = create(self.config, self.model.params)
        _, metrics, _ = self.loop.watched_step(state)
        print(f"loaded and compiled in {self.passed():.0f} s, "
              f"mismatch KL {metrics['mismatch_kl']:.1e}", flush=True)  # fmt: skip

    def tried(self, task: str, params: Params) -> Tried:
        """The questions held out, eight answers each, by the program that draws in training."""
        q, count = self.questions[task], self.args.prompts
        self.loop.rollouts.update_weights(params, 0)
        M = len(q.held_out["lengths"])
        right, said = [], []
        for number, first in enumerate(range(0, M, count)):
            place = np.arange(first, first + count) % M  # the last part begins anew
            rows = {name: a[place] for name, a in q.held_out.items()}
            r = generate(self.loop.rollouts, rows, _HELD_OUT, number)
            answers = answers_of(r, rows, self.config.group_size)
            scores = np.asarray(q.scorer(answers)).reshape(count, -1) == 1.0
            right.append(scores.mean(axis=1)[: M - first])
            said += [self.model.tokenizer.decode(s.answer) for s in answers.samples[::GROUP]]
        return Tried(np.concatenate(right), said[: min(M, SHOWN)])

    def learn(self, task: str, seed: int, steps: int, until: float) -> Learnt:
        """A run of `steps`, or of fewer where `until` seconds since the start have passed."""
        begun, q = time.perf_counter(), self.questions[task]
        self.loop.problems, self.loop.scorers = dict(q.train), (q.scorer,)
        state: RLState = create(self.config, self.model.params, seed=seed)
        before = self.tried(task, state.trained.policy)
        found = Learnt([], [], {0: float(before.right.mean())}, before, before, 0.0)
        for step in range(1, steps + 1):
            state, metrics, experience = self.loop.watched_step(state)
            found.rewards.append(metrics["reward"])
            right = 0.0 if experience is None else float(jnp.mean(experience.rewards == 1.0))
            found.right.append(right)
            if step % EVERY == 0 or step == steps:
                share = self.tried(task, state.trained.policy).right.mean()
                found.on_the_way[step] = float(share)
                print(f"{task} seed {seed} step {step}: reward {metrics['reward']:.3f}, right "
                      f"{right:.3f}, held out {share:.3f}, {metrics['step_time']:.2f} s a step, "
                      f"{self.passed():.0f} s", flush=True)  # fmt: skip
            if self.passed() > until:
                break
        found.after = self.tried(task, state.trained.policy)
        found.seconds = time.perf_counter() - begun
        return found


def interval(each: np.ndarray) -> tuple[float, float]:
    """95 % of the mean, by a bootstrap over questions: answers to one are not independent."""
    draws = np.random.default_rng(0).integers(0, len(each), (2000, len(each)))
    low, high = np.quantile(each[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def entry(bench: Bench, task: str, runs: list[Learnt]) -> Entry:
    """The ledger's entry of a task; prints its table."""
    rows = {"after": [r.after.right for r in runs], "before": [r.before.right for r in runs]}
    gained = np.mean([r.after.right - r.before.right for r in runs], axis=0)
    told: dict[str, Any] = {"gain": [float(gained.mean()), *interval(gained)]}
    for when, right in rows.items():
        told[f"interval {when}"] = [interval(x) for x in right]
        shown = "  ".join(
            f"{x.mean():.3f} ({low:.3f}-{high:.3f})"
            for x, (low, high) in zip(right, told[f"interval {when}"], strict=True)
        )
        print(f"{task:10s} {when:6s} {shown}")
    print("{:10s} gain   {:.3f} ({:.3f}-{:.3f})".format(task, *told["gain"]))
    q, args, steps = bench.questions[task], bench.args, [len(r.rewards) for r in runs]
    asked = [bench.model.tokenizer.decode(row[:n]) for row, n in
             zip(q.held_out["prompts"][:SHOWN], q.held_out["lengths"], strict=False)]  # fmt: skip
    return Entry(
        name=f"smollm2-learning-{task.replace('_', '-')}",
        claim=f"SmolLM2-135M-Instruct learns {task} by GRPO: right answers on "
              f"{len(q.held_out['lengths'])} questions held out",
        command="python -m benchmarks.smollm2_learning OUT",
        unit="of 1",
        samples={when: [float(x.mean()) for x in right] for when, right in rows.items()},
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
            "held_out_by_step": [r.on_the_way for r in runs],
            "samples": [
                {"question": text.strip().removesuffix("assistant").strip().splitlines()[-1],
                 "answer": q.answers[int(n)], "before": b, "after": a}
                for text, n, b, a in zip(asked, q.held_out["number"],
                                         runs[0].before.said, runs[0].after.said,
                                         strict=False)
            ],
        },
    )  # fmt: skip


def curves(found: dict[str, list[Learnt]]) -> bytes:
    """Right answers of each step, and to the questions held out, a line a seed."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.5 * len(found), 3.2), layout="constrained")
    for ax, (task, runs) in zip(
        fig.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for seed, run in enumerate(runs):
            ax.plot(np.arange(1, len(run.right) + 1), run.right, color="C0", linewidth=0.6,
                    label="each step's" if seed == 0 else None)  # fmt: skip
            steps, shares = zip(*run.on_the_way.items(), strict=True)
            ax.plot(steps, shares, color="C1", marker=".",
                    label="held out" if seed == 0 else None)  # fmt: skip
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
