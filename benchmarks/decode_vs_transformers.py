"""Greedy decoding of SmolLM2-135M, float32, batch 1: jaxinfra beside transformers, one process.

Both read the same GGUF and answer the same prompt with the same number of tokens; rounds are
interleaved, after one warm-up each. transformers runs `generate` with its dynamic and its static
cache; the faster one counts. Compilation and loading are outside the clock of both.

    python -m benchmarks.decode_vs_transformers           # about three minutes on two idle cores
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import jax.numpy as jnp
import torch
import transformers

from jaxinfra.generate import generate
from jaxinfra.generate.session import token_bytes
from jaxinfra.hardware.ceilings import ceilings
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.model.cache import unstack
from jaxinfra.text import Tokenizer
from jaxinfra.weights.open import load_weights
from jaxinfra.weights.pull import pull

PROMPT = "Explain in a few sentences why the sky is blue during the day and red in the evening."
NEW_TOKENS = 64

Contestant = Callable[[], tuple[float, float, list[int]]]  # (tokens/s, first token in s, tokens)


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when `generate` hands over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def peer(model, ids: list[int], cache: str) -> Contestant:
    """transformers' greedy `generate`, never stopped by an end-of-text token."""

    def run() -> tuple[float, float, list[int]]:
        clock, start = Clock(), time.perf_counter()
        prompt = torch.tensor([ids])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, streamer=clock,
            max_new_tokens=NEW_TOKENS, cache_implementation=cache,
        )  # fmt: skip
        first, last = clock.times[1], clock.times[-1]
        return (NEW_TOKENS - 1) / (last - first), first - start, out[0, len(ids) :].tolist()

    return run


def ours(params, config, ids: list[int]) -> Contestant:
    """jaxinfra's `generate`."""

    def run() -> tuple[float, float, list[int]]:
        g = generate(params, config, [ids], max_new_tokens=NEW_TOKENS)
        return g.timings.decode_tokens_per_second, g.timings.first_token, g.tokens[0]

    return run


def main() -> None:
    """Runs all contestants in turn and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a short name or a .gguf file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", help="the folder of the ledger, to write an entry there")
    arguments = parser.parse_args()
    path = pull(arguments.model)
    config, params = load_weights(path, jnp.float32)
    params = unstack(params, config)
    ids = Tokenizer.from_gguf(path).encode_chat([{"role": "user", "content": PROMPT}])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # both decode NEW_TOKENS whatever they say
    contestants = {
        "jaxinfra": ours(params, config, ids),
        "transformers dynamic": peer(model, ids, "dynamic"),
        "transformers static": peer(model, ids, "static"),
    }
    samples = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for turn in range(arguments.rounds):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(contestants[name]())
    rates = {name: [run[0] for run in runs] for name, runs in samples.items()}
    first = {name: [run[1] for run in runs] for name, runs in samples.items()}
    for name in contestants:
        print(f"{name:20s} {median(rates[name]):5.1f} tokens/s, first {median(first[name]):.3f} s")
    peers = list(contestants)[1:]
    best = max(peers, key=lambda name: median(rates[name]))
    ratio = median(rates["jaxinfra"]) / median(rates[best])
    sooner = min(median(first[name]) for name in peers) / median(first["jaxinfra"])
    bandwidth = ceilings().bandwidth
    moved = token_bytes(params, config, len(ids) + NEW_TOKENS // 2) * median(rates["jaxinfra"])
    equal = samples["jaxinfra"][0][2] == samples[best][0][2]
    entry = Entry(
        name="decode-smollm2-135m-cpu",
        claim="Batch-1 greedy decoding of SmolLM2-135M, float32, CPU; the first token "
        f"{sooner:.2f} times as soon",
        command="python -m benchmarks.decode_vs_transformers",
        unit="tokens/s",
        samples={name: rates[name] for name in ("jaxinfra", best)},
        ratio=ratio,
        interval=ratio_interval(
            tuple(1 / rate for rate in rates["jaxinfra"]), tuple(1 / rate for rate in rates[best])
        ),
        roofline=moved / bandwidth,
        roof=f"{bandwidth / 1e9:.1f} GB/s of copy bandwidth measured in this run",
        inputs=f"one chat prompt of {len(ids)} tokens, {NEW_TOKENS} new tokens, batch 1, float32",
        mislead="One small model, whose weights a large cache may hold in part; other work on the "
        "machine slows thread pools that spin more than those that sleep",
        environment=environment(),
        extra={"tokens_per_s": rates, "first_token_s": first, "same_tokens": equal},
    )
    print(f"{ratio:.2f} times {best}; tokens {'identical' if equal else 'DIFFER'}")
    print(f"{entry.claim}; {entry.roofline:.0%} of {entry.roof}")
    if arguments.results:
        write(entry, arguments.results)


if __name__ == "__main__":
    main()
