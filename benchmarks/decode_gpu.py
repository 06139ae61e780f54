"""Batch-1 greedy decoding of the Qwen3-0.6B shape on one GPU, beside transformers.

    python -m benchmarks.decode_gpu            # about two minutes on one H200

The same shape in bfloat16 with random weights, a prompt of 128 random tokens and 512 new ones, no
stop. transformers runs `generate` with its static cache, which it compiles. The two take turns in
processes of their own. Speed is that of the tokens after the first.
"""

from __future__ import annotations

import os
import sys
import time
from statistics import median

import numpy as np

from benchmarks.turns import Contestant, answer
from jaxinfra.model.presets import PRESETS

MODEL, PROMPT, NEW_TOKENS, ROUNDS = "qwen3-0.6b", 128, 512, 5
CONFIG = PRESETS[MODEL]


def prompt() -> list[int]:
    """The same random ids for both."""
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, PROMPT).tolist()


def ours() -> None:
    """One answer of this project a turn: tokens/s and the bytes that a token must read."""
    import jax
    import jax.numpy as jnp

    from jaxinfra.generate import generate
    from jaxinfra.generate.session import token_bytes
    from jaxinfra.model.cache import unstack
    from jaxinfra.model.params import init

    @jax.jit
    def create(key):
        return unstack(init(key, CONFIG, jnp.bfloat16), CONFIG)

    params = create(jax.random.key(0))
    moved = token_bytes(params, CONFIG, PROMPT + NEW_TOKENS // 2)

    def turn() -> dict:
        made = generate(params, CONFIG, [prompt()], max_new_tokens=NEW_TOKENS)
        return {"rate": made.timings.decode_tokens_per_second, "moved": moved}

    turn()
    answer(turn)


def theirs() -> None:
    """One answer of transformers a turn: tokens/s, the time to the first token taken off."""
    import torch
    import transformers

    raw = CONFIG.to_hf() | {"eos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.tensor([prompt()], device="cuda")

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count,
            max_new_tokens=count, cache_implementation="static",
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(NEW_TOKENS)
    seconds(1)
    answer(lambda: {"rate": (NEW_TOKENS - 1) / (seconds(NEW_TOKENS) - seconds(1))})


def main() -> None:
    """Both in turns, then the ledger's entry."""
    no_reserve = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    names = {"ours": "jaxinfra", "theirs": "transformers, static cache"}
    contestants = {n: Contestant("benchmarks.decode_gpu", n, **no_reserve) for n in names}
    turns: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(ROUNDS):
        for name in list(names)[:: 1 if turn % 2 == 0 else -1]:
            turns[name].append(contestants[name].turn())
    for contestant in contestants.values():
        contestant.close()
    record({names[n]: [t["rate"] for t in made] for n, made in turns.items()}, turns["ours"][0])


def record(rates: dict[str, list[float]], first: dict) -> None:
    """Writes the ledger's entry."""
    import torch  # noqa: F401  (so that the conditions name its version)
    import transformers  # noqa: F401

    from jaxinfra.hardware.detect import here
    from jaxinfra.measure import Entry, environment, write
    from jaxinfra.measure.compare import ratio_interval

    mine, other = (median(values) for values in rates.values())
    bandwidth = here().bandwidth
    low, high = ratio_interval(*(tuple(1 / rate for rate in v) for v in rates.values()))
    entry = Entry(
        name="decode-qwen3-0-6b-batch-1",
        claim="Batch-1 greedy decoding of the Qwen3-0.6B shape, bfloat16, one GPU",
        command="python -m benchmarks.decode_gpu",
        unit="tokens/s",
        samples=rates,
        ratio=mine / other,
        interval=(low, high),
        roofline=mine * first["moved"] / bandwidth,
        roof=f"{bandwidth / 1e12:.2f} TB/s of copy bandwidth measured in this run",
        inputs=f"random weights, {PROMPT} random prompt tokens, {NEW_TOKENS} new, cache of 1,024",
        mislead="small models are bound by launches, not by bandwidth; random weights choose the "
        "same work as real ones, but no stop token ends an answer; the roof is a copy of this run, "
        "less than the memory's speed on paper",
        environment=environment(),
    )
    print({name: [round(rate) for rate in values] for name, values in rates.items()})
    print(f"{mine:,.0f} tokens/s, {entry.roofline:.1%} of {entry.roof}, ratio {entry.ratio:.2f}")
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    {"ours": ours, "theirs": theirs}.get(sys.argv[-1], main)()
