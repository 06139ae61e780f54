"""What it costs that calls are held: tokens/s with a tool's grammar, beside the same without.

    python -m benchmarks.tool_calls        # four minutes on two cores, one on a GPU

Sixteen answers at once. `free`: no grammar. `offered`: tools are offered, the model writes words,
the grammar waits for a call and masks nothing. `calls`: each answer is one call of a tool with a
nested schema, and every token of it is masked; beside it, answers without a grammar that are made
to be exactly as long. Kinds take turns in one process; the prefix cache is emptied before each. On
a CPU SmolLM2-135M, on a GPU the body of Qwen3-0.6B with random weights, as
`benchmarks.tree_of_thoughts` writes it.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from decode.server.calls import held, offered
from decode.server.protocol import Function

ROWS, ROUNDS, WORDS = 16, 5, 64
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"enum": ["metric", "imperial"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "zip": {"anyOf": [{"type": "null"}, {"type": "integer", "maximum": 99999}]},
    },
    "required": ["city", "days", "units", "tags", "zip"], "additionalProperties": False,
}  # fmt: skip
TOOLS = [Function(name=name, parameters=PLACE) for name in ("forecast", "history", "alerts")]


def engine(folder: str, gpu: bool) -> Any:
    """An engine with all its programs."""
    import jaxinfra
    from decode.config import EngineConfig
    from decode.engine import Engine

    loaded = jaxinfra.load(folder, dtype="bfloat16" if gpu else "float32")
    made = Engine.of(loaded, EngineConfig(max_len=512, max_running=ROWS, budget=256))
    made.finish()
    return made


def measure(made: Any, encode: Any) -> dict[str, list[float]]:
    """Tokens/s of all answers, by kind, a round each; and of the calls beside what they hold."""
    from decode.request import Request, SamplingParams

    prompts = [encode(f"Day {i}. The weather is asked for, and it is told. ") for i in range(ROWS)]
    base = SamplingParams(max_tokens=WORDS, temperature=1.0, ignore_eos=True)
    calls = SamplingParams(max_tokens=160, grammar=held(TOOLS, "hermes", False, None))
    kinds = {
        "free": base,
        "offered": replace(base, grammar=offered(TOOLS, "hermes", True, None)),
        "calls": calls,
    }

    def turn(params: SamplingParams, lengths: list[int] | None = None) -> tuple[float, list[int]]:
        made.forget()
        asked = [
            Request(str(i), tuple(ids), replace(
                params, seed=i, max_tokens=lengths[i] if lengths else params.max_tokens))
            for i, ids in enumerate(prompts)
        ]  # fmt: skip
        counts = dict.fromkeys((one.id for one in asked), 0)
        start = time.perf_counter()
        for output in made.generate(asked):
            assert output.finish_reason != "error", output.error
            counts[output.request_id] += len(output.token_ids)
        seconds = time.perf_counter() - start
        return sum(counts.values()) / seconds, list(counts.values())

    _, lengths = turn(calls)
    rates: dict[str, list[float]] = {name: [] for name in (*kinds, "as long as the calls")}
    turn(base)
    for number in range(ROUNDS):
        for name in list(rates)[:: 1 if number % 2 == 0 else -1]:
            rate, _ = turn(kinds[name]) if name in kinds else turn(base, lengths)
            rates[name].append(rate)
    return rates


def main() -> None:
    """Measures, prints, and writes the ledger's two entries."""
    import jax

    from benchmarks.tree_of_thoughts import write_random
    from jaxinfra.text import Tokenizer
    from jaxinfra.weights.pull import pull

    gpu = jax.default_backend() != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if gpu:
            write_random(Path(folder))
        path = folder if gpu else str(pull("smollm2-135m"))
        rates = measure(engine(path, gpu), Tokenizer.from_path(path).encode)
    for name, values in rates.items():
        print(f"{name:24s} {median(values):8.1f} tokens/s")
    for ours, peer, what in (
        ("offered", "free", "answers in words where tools are offered"),
        ("calls", "as long as the calls", "answers that are calls, every token masked"),
    ):
        record(rates, ours, peer, what, "gpu" if gpu else "cpu")


def record(rates: dict[str, list[float]], ours: str, peer: str, what: str, where: str) -> None:
    """One entry: `ours` beside `peer`."""
    from jaxinfra.measure import Entry, environment, write
    from jaxinfra.measure.compare import ratio_interval

    ratio = median(rates[ours]) / median(rates[peer])
    times = {name: tuple(1 / rate for rate in rates[name]) for name in (ours, peer)}
    model = "SmolLM2-135M, float32" if where == "cpu" else "Qwen3-0.6B's body, bfloat16"
    entry = Entry(
        name=f"tool-calls-{ours}-{where}",
        claim=f"{what}, beside as many tokens that nothing holds; {ROWS} at once, {model}",
        command="python -m benchmarks.tool_calls",
        unit="tokens/s",
        samples={f"held: {ours}": rates[ours], "not held": rates[peer]},
        ratio=ratio,
        interval=ratio_interval(times[ours], times[peer]),
        roofline=None,
        roof="none: it is the host's cost beside the device's that is asked for",
        inputs=f"{ROWS} prompts of some 20 tokens; three tools of one nested schema",
        mislead="A mask's cost is the host's and hides behind a slow device: the smaller the model "
        "and the faster the device, the more of it is seen. Where tokens are masked, a step is "
        "read before the next is planned, and makes one token a row",
        environment=environment(),
    )
    print(f"{ours}: {ratio:.3f} times {peer}")
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    main()
