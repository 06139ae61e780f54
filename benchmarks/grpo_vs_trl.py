"""One GRPO step beside TRL's GRPOTrainer on one GPU: the same weights, prompts, lengths and update.

    python -m benchmarks.grpo_vs_trl OUT smollm2-135m      # about four minutes on one H200
    python -m benchmarks.grpo_vs_trl OUT qwen3-0.6b
    python -m benchmarks.grpo_vs_trl OUT tiny              # a try on a CPU

16 prompts x 8 answers of SmolLM2-135M's shape or 8 x 8 of Qwen3-0.6B's, 64 + 256 tokens, random
weights in bfloat16, no divergence, one update. TRL generates by `generate` (its default) and by
transformers' paged continuous batching.

With EOS off every answer has 256 tokens. With EOS on, the stop token's row of the embedding is set
so that answers have about 100 tokens. Each contestant lives in a process of its own; ours compiles
before the others touch the device, no turn begins before all are ready, and they take turns, so
that nobody computes beside another. One that fails is reported and left out.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.grpo_contestants import GO, GROUP, MEAN_LENGTH, NEW, OURS, PROMPT, PROMPTS, TRL
from benchmarks.turns import Contestant

MODULE = "benchmarks.grpo_contestants"
ROUNDS = 3
Told = dict[str, list[dict]]  # the turns of each contestant


def main(argv: Sequence[str]) -> None:
    """All in turns, then the table and the ledger."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo_vs_trl")
    parser.add_argument("out", type=Path, help="folder of the entries")
    parser.add_argument("shape", choices=list(PROMPTS))
    parser.add_argument("--seconds", type=float, default=270.0, help="in all")
    args = parser.parse_args(argv)
    started, turns = time.monotonic(), {}
    passed = lambda: time.monotonic() - started  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1",
               "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip
        _write_weights([f"{args.shape}|weights|{folder}"], os.environ | env)
        print(f"weights after {passed():.0f} s", flush=True)
        at_work = {
            name: Contestant(MODULE, f"{args.shape}|{name}|{folder}", **env)
            for name in (OURS, *TRL)
        }
        for name in list(at_work):  # ours comes first
            if name != OURS:
                Path(folder, GO).touch()
            ready = _turn(at_work, name, started + 0.7 * args.seconds)
            print(f"{name}: {ready} after {passed():.0f} s", flush=True)
        cost = dict.fromkeys(at_work, 0.0)
        for number in range(ROUNDS):
            for name in list(at_work)[:: 1 if number % 2 == 0 else -1]:
                begun = passed()
                if begun + cost[name] > 0.9 * args.seconds:
                    continue
                if result := _turn(at_work, name, started + args.seconds):
                    turns.setdefault(name, []).append(result)
                    print(name, result, flush=True)
                cost[name] = passed() - begun
        for contestant in at_work.values():
            contestant.close()
    record(args.shape, turns, args.out)
    print(f"{passed():.0f} s in all")


def _write_weights(names: list[str], env: dict[str, str]) -> None:
    made = [subprocess.Popen([sys.executable, "-m", MODULE, name], env=env) for name in names]
    if any([process.wait() for process in made]):
        raise RuntimeError("the weights could not be made")


def _turn(at_work: dict[str, Contestant], key: str, until: float) -> dict | None:
    """A turn of one contestant; one that fails, or is late, is reported and leaves."""

    def late(*_: Any) -> None:
        raise RuntimeError("too late")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(max(1, round(until - time.monotonic())))
    try:
        return at_work[key].turn()
    except (RuntimeError, OSError) as error:
        print(f"{key}: {error}: left out", flush=True)
        at_work.pop(key)._process.kill()
        return None
    finally:
        signal.alarm(0)


def record(shape: str, turns: Told, out: Path) -> None:
    """Prints a shape's table and writes its two entries: without EOS and with."""
    import torch  # noqa: F401  (so that the conditions name its version)
    import transformers  # noqa: F401

    from jaxinfra.hardware.detect import detect
    from jaxinfra.measure import Entry, environment, write
    from jaxinfra.model.counts import train_flops_per_token
    from jaxinfra.model.presets import PRESETS

    if OURS not in turns:
        return
    model, chip, answers = PRESETS[shape], detect(), PROMPTS[shape] * GROUP
    for phase in ("off", "on"):
        seconds = {n: [s for t in told for s in t["seconds"][phase]] for n, told in turns.items()}
        tokens = {n: median([x for t in told for x in t["tokens"][phase]])
                  for n, told in turns.items()}  # fmt: skip
        peers = sorted(
            (name for name in TRL if name in seconds),
            key=lambda name: median(seconds[name]),
        )  # the fastest first
        samples = {name: seconds[name] for name in (OURS, *peers)}
        for name, values in samples.items():
            peak = (turns[name][-1]["peak_bytes"] or 0) / 1e9
            print(f"{shape:13s} EOS {phase:3s} {name:31s} {median(values):8.3f} s a step  "
                  f"{median(values) / median(samples[OURS]):6.2f}x  {tokens[name]:4.0f} tokens  "
                  f"{peak:6.1f} GB")  # fmt: skip
        mismatch = [x for t in turns[OURS] for x in t["mismatch_kl"]]
        alone = median(t["rollout_s"][phase] for t in turns[OURS])
        print(
            f"{shape:13s} EOS {phase:3s} mismatch KL of ours, most: {max(mismatch):.2e}; its "
            f"rollout alone {alone:.3f} s; traced in {turns[OURS][0]['trace_s']:.0f} s, "
            f"compiled in {turns[OURS][0]['compile_s']:.0f} s"
        )
        if phase == "on" and tokens[OURS] > 2 * MEAN_LENGTH:
            print(f"EOS on, and answers of {tokens[OURS]:.0f} tokens: not written")
            continue
        mine, other = samples[OURS], samples.get(peers[0], []) if peers else []
        work = train_flops_per_token(model, PROMPT + NEW) * answers * (PROMPT + NEW)
        floor = work / (chip.flops["bfloat16"] or float("inf"))
        entry = Entry(
            name=f"grpo-{shape.replace('.', '-')}-eos-{phase}",
            claim=f"One GRPO step of {PROMPTS[shape]} x {GROUP} answers, {PROMPT} + {NEW} tokens, "
                  f"{shape}'s shape, one GPU, EOS {phase}",
            command=f"python -m benchmarks.grpo_vs_trl OUT {shape}",
            unit="s a step",
            samples=samples,
            ratio=median(other) / median(mine) if other else None,
            interval=(min(other) / max(mine), max(other) / min(mine)) if other else None,
            roofline=floor / median(mine) if floor else None,
            roof="the update's matrix products at the chip's bfloat16 rate on paper; decoding, "
                 "which waits for memory, counts nothing",
            inputs=f"random weights in bfloat16 (ours: float32 masters), {PROMPT} random tokens a "
                   f"prompt, beta 0, one update; mean answers of {tokens[OURS]:.0f} tokens",
            mislead="the ratio is to the fastest generation that TRL 1.16 offers without vLLM, "
                    "which would be faster; the interval is the extremes of the samples; "
                    "TRL's update has two microbatches, weights and moments in bfloat16, SDPA and "
                    "no recomputation; ours keeps matrix products alone; random weights",
            environment=environment(),
            extra={"mismatch_kl_max": max(mismatch),
                   "peak_bytes": {n: t[-1]["peak_bytes"] for n, t in turns.items()},
                   "mean_tokens": tokens, "compile_s": turns[OURS][0]["compile_s"],
                   "rollout_s": [t["rollout_s"][phase] for t in turns[OURS]]},
        )  # fmt: skip
        write(entry, out)


if __name__ == "__main__":
    main(sys.argv[1:])
