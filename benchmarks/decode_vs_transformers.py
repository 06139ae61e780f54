"""Greedy decoding of SmolLM2-135M, float32, batch 1, on a CPU: this project beside transformers.

    python -m benchmarks.decode_vs_transformers           # about three minutes on two idle cores

Both read the same GGUF and answer the same prompt with the same number of tokens, in turns, each
in a process of its own, after a warm-up. transformers runs `generate` with its dynamic and its
static cache; the faster one counts. Compilation and loading are outside the clock of both.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from statistics import median

from benchmarks.turns import Contestant, answer
from jaxinfra.text import Tokenizer
from jaxinfra.weights.pull import pull

MODEL, NEW_TOKENS, ROUNDS = "smollm2-135m", 64, 7
PROMPT = "Explain in a few sentences why the sky is blue during the day and red in the evening."


def prompt() -> list[int]:
    """The chat prompt as token ids, the same for both."""
    return Tokenizer.from_gguf(pull(MODEL)).encode_chat([{"role": "user", "content": PROMPT}])


def ours() -> None:
    """One answer a turn: tokens/s, seconds to the first token, the tokens, bytes a token reads."""
    import jax.numpy as jnp

    from jaxinfra.generate import generate
    from jaxinfra.generate.session import token_bytes
    from jaxinfra.model.cache import unstack
    from jaxinfra.weights.open import load_weights

    config, weights = load_weights(pull(MODEL), jnp.float32)
    params, ids = unstack(weights, config), prompt()
    moved = token_bytes(params, config, len(ids) + NEW_TOKENS // 2)

    def turn() -> dict:
        g = generate(params, config, [ids], max_new_tokens=NEW_TOKENS)
        rate, first = g.timings.decode_tokens_per_second, g.timings.first_token
        return {"rate": rate, "first": first, "tokens": g.tokens[0], "moved": moved}

    turn()
    answer(turn)


def theirs(cache: str) -> None:
    """The same of transformers' greedy `generate`, never stopped by an end-of-text token."""
    import torch
    import transformers

    class Clock(transformers.generation.streamers.BaseStreamer):
        """Notes when `generate` hands over the prompt and each token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    path = pull(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt()])

    def turn() -> dict:
        clock, start = Clock(), time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=clock,
            max_new_tokens=NEW_TOKENS, cache_implementation=cache,
        )  # fmt: skip
        first, last = clock.times[1], clock.times[-1]
        rate, tokens = (NEW_TOKENS - 1) / (last - first), out[0, ids.shape[1] :].tolist()
        return {"rate": rate, "first": first - start, "tokens": tokens}

    turn()
    answer(turn)


def main() -> None:
    """All in turns, then the ledger's entry."""
    pull(MODEL)
    names = {
        "ours": "jaxinfra",
        "dynamic": "transformers, dynamic cache",
        "static": "transformers, static cache",
    }
    contestants = {n: Contestant("benchmarks.decode_vs_transformers", n) for n in names}
    turns: dict[str, list[dict]] = {name: [] for name in names.values()}
    for turn in range(ROUNDS):
        for name in list(names)[:: 1 if turn % 2 == 0 else -1]:
            turns[names[name]].append(contestants[name].turn())
    for contestant in contestants.values():
        contestant.close()
    record(turns)


def record(turns: dict[str, list[dict]]) -> None:
    """Prints medians and ratios and writes the ledger's entry."""
    import torch  # noqa: F401  (so that the conditions name its version)
    import transformers  # noqa: F401

    from jaxinfra.hardware.ceilings import ceilings
    from jaxinfra.measure import Entry, environment, write
    from jaxinfra.measure.compare import ratio_interval

    rates = {name: [run["rate"] for run in runs] for name, runs in turns.items()}
    first = {name: [run["first"] for run in runs] for name, runs in turns.items()}
    for name in turns:
        print(f"{name:28s} {median(rates[name]):5.1f} tokens/s, first {median(first[name]):.3f} s")
    peers = list(turns)[1:]
    best = max(peers, key=lambda name: median(rates[name]))
    ratio = median(rates["jaxinfra"]) / median(rates[best])
    sooner = min(median(first[name]) for name in peers) / median(first["jaxinfra"])
    bandwidth = ceilings().bandwidth
    mine, theirs_too = turns["jaxinfra"][0], turns[best][0]
    equal = mine["tokens"] == theirs_too["tokens"]
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
        roofline=mine["moved"] * median(rates["jaxinfra"]) / bandwidth,
        roof=f"{bandwidth / 1e9:.1f} GB/s of copy bandwidth measured in this run",
        inputs=f"one chat prompt of {len(prompt())} tokens, {NEW_TOKENS} new tokens",
        mislead="One small model, whose weights a large cache may hold in part; other work on the "
        "machine slows thread pools that spin more than those that sleep",
        environment=environment(),
        extra={"tokens_per_s": rates, "first_token_s": first, "same_tokens": equal},
    )
    print(f"{ratio:.2f} times {best}; tokens {'identical' if equal else 'DIFFER'}")
    print(f"{entry.claim}; {entry.roofline:.0%} of {entry.roof}")
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    contestants = {n: functools.partial(theirs, n) for n in ("dynamic", "static")}
    ({"ours": ours} | contestants).get(sys.argv[-1], main)()
