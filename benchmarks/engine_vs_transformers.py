"""Sixteen prompts at once, SmolLM2-135M, float32, on a CPU: the engine beside transformers.

    python -m benchmarks.engine_vs_transformers           # about three minutes on two idle cores

Both read the same GGUF and answer the same sixteen prompts of 20 to 120 tokens, greedily, with the
same number of new tokens each. transformers runs `generate` on one left-padded batch with its
dynamic cache. A turn's clock runs from the first prompt handed over to the last token; compilation
and loading are outside it. The engine's prefix cache is emptied before each turn.
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

MODEL, NEW_TOKENS, ROUNDS, ROWS = "smollm2-135m", 48, 5, 16
TEXT = (
    "The history of computing is longer than the history of computing hardware and includes the "
    "history of methods intended for pen and paper or for chalk and slate, with or without the aid "
    "of tables. "
) * 4


def prompts() -> list[list[int]]:
    """Sixteen beginnings of one text, of different lengths and starts."""
    ids = Tokenizer.from_gguf(pull(MODEL)).encode(TEXT)
    return [ids[i : i + 20 + (i * 37) % 100] for i in range(ROWS)]


def ours() -> None:
    """One turn: tokens/s of all answers, and the answers."""
    from decode import Engine, EngineConfig, Request, SamplingParams

    engine = Engine.load(MODEL, EngineConfig(max_len=512, max_running=ROWS, budget=256))
    engine.finish()
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    asked = [Request(str(i), tuple(ids), params) for i, ids in enumerate(prompts())]

    def turn() -> dict:
        engine.forget()
        made: dict[str, list[int]] = {request.id: [] for request in asked}
        start = time.perf_counter()
        for output in engine.generate(asked):
            made[output.request_id] += output.token_ids
        seconds = time.perf_counter() - start
        return {"rate": ROWS * NEW_TOKENS / seconds, "tokens": list(made.values())}

    turn()
    answer(turn)


def theirs() -> None:
    """The same of transformers' greedy `generate` on one batch."""
    import torch
    import transformers

    path = pull(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    rows = prompts()
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def turn() -> dict:
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
        seconds = time.perf_counter() - start
        return {"rate": ROWS * NEW_TOKENS / seconds, "tokens": out[:, longest:].tolist()}

    turn()
    answer(turn)


def main() -> None:
    """Both in turns, then the ledger's entry."""
    pull(MODEL)
    names = {"ours": "jaxinfra", "theirs": "transformers, one padded batch"}
    contestants = {n: Contestant("benchmarks.engine_vs_transformers", n) for n in names}
    turns: dict[str, list[dict]] = {name: [] for name in names.values()}
    for turn in range(ROUNDS):
        for name in list(names)[:: 1 if turn % 2 == 0 else -1]:
            turns[names[name]].append(contestants[name].turn())
    for contestant in contestants.values():
        contestant.close()
    record(turns)


def record(turns: dict[str, list[dict]]) -> None:
    """Prints medians and their ratio and writes the ledger's entry."""
    import torch  # noqa: F401  (so that the conditions name its version)
    import transformers  # noqa: F401

    from jaxinfra.measure import Entry, environment, write
    from jaxinfra.measure.compare import ratio_interval

    rates = {name: [run["rate"] for run in runs] for name, runs in turns.items()}
    for name in turns:
        print(f"{name:32s} {median(rates[name]):6.1f} tokens/s")
    ours, peer = turns
    ratio = median(rates[ours]) / median(rates[peer])
    rows = zip(turns[ours][0]["tokens"], turns[peer][0]["tokens"], strict=True)
    equal = sum(a == b for a, b in rows)
    entry = Entry(
        name="engine-smollm2-135m-cpu",
        claim=f"{ROWS} prompts at once, SmolLM2-135M, float32, CPU, prompts included",
        command="python -m benchmarks.engine_vs_transformers",
        unit="tokens/s",
        samples=rates,
        ratio=ratio,
        interval=ratio_interval(
            tuple(1 / rate for rate in rates[ours]), tuple(1 / rate for rate in rates[peer])
        ),
        roofline=None,
        roof="none: reading prompts is bound by arithmetic, answering by memory",
        inputs=f"{ROWS} prompts of 20 to 120 tokens, {NEW_TOKENS} new tokens each",
        mislead="All answers have one length, which suits a padded batch; where lengths differ, "
        "continuous batching gains more than is shown. Other work on the machine slows both",
        environment=environment(),
        extra={"same_answers": equal},
    )
    print(f"{ratio:.2f} times {peer}; {equal} of {ROWS} answers are the same, token for token")
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    ({"ours": ours, "theirs": functools.partial(theirs)}).get(sys.argv[-1], main)()
