"""Batch-1 greedy decoding of the Qwen3-0.6B shape on one GPU, beside transformers.

    python -m benchmarks.decode_gpu            # about two minutes on one H200

The same shape in bfloat16 with random weights, a prompt of 128 random tokens and 512 new ones, no
stop. transformers runs `generate` with its static cache, which it compiles. The two take turns in
one process. Speed is that of the tokens after the first.
"""

from __future__ import annotations

import os
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.generate import generate
from jaxinfra.generate.session import token_bytes
from jaxinfra.hardware.detect import here
from jaxinfra.measure import Entry, environment, write
from jaxinfra.measure.compare import ratio_interval
from jaxinfra.model.cache import unstack
from jaxinfra.model.params import init
from jaxinfra.model.presets import PRESETS

MODEL, PROMPT, NEW_TOKENS, ROUNDS = "qwen3-0.6b", 128, 512, 5


def ours(prompt: list[int]):
    """One answer of this project; returns tokens/s and the bytes that a token must read."""
    config = PRESETS[MODEL]
    params = jax.jit(lambda key: unstack(init(key, config, jnp.bfloat16), config))(
        jax.random.key(0)
    )

    def run() -> float:
        made = generate(params, config, [prompt], max_new_tokens=NEW_TOKENS)
        return made.timings.decode_tokens_per_second

    return run, token_bytes(params, config, PROMPT + NEW_TOKENS // 2)


def theirs(prompt: list[int]):
    """One answer of transformers; returns tokens/s, the time to the first token taken off."""
    import torch
    import transformers

    raw = PRESETS[MODEL].to_hf() | {"eos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.tensor([prompt], device="cuda")

    def answer(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count,
            max_new_tokens=count, cache_implementation="static",
        )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - start

    answer(NEW_TOKENS)
    answer(1)
    return lambda: (NEW_TOKENS - 1) / (answer(NEW_TOKENS) - answer(1))


def main() -> None:
    """Both in turns, then the ledger's entry."""
    vocabulary = PRESETS[MODEL].vocab_size
    prompt = np.random.default_rng(0).integers(0, vocabulary, PROMPT).tolist()
    run, moved = ours(prompt)
    contestants = {"jaxinfra": run, "transformers, static cache": theirs(prompt)}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    run()
    for turn in range(ROUNDS):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            rates[name].append(contestants[name]())
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
        roofline=mine * moved / bandwidth,
        roof=f"{bandwidth / 1e12:.2f} TB/s of copy bandwidth measured in this run",
        inputs=f"random weights, {PROMPT} random prompt tokens, {NEW_TOKENS} new, cache of 1,024",
        mislead="small models are bound by launches, not by bandwidth; random weights choose the "
        "same work as real ones, but no stop token ends an answer",
        environment=environment(),
    )
    print({name: [round(rate) for rate in values] for name, values in rates.items()})
    print(f"{mine:,.0f} tokens/s, {entry.roofline:.1%} of {entry.roof}, ratio {entry.ratio:.2f}")
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    main()
