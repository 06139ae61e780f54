"""The engine on one GPU: Qwen3-0.6B's shape, random weights, bfloat16.

    python -m benchmarks.engine_gpu            # eight minutes on one H200, and the peer's turns
    python -m benchmarks.engine_gpu single     # one of the loads

Two loads, each in processes of their own. `workload` is nano-vllm's (its bench.py): 256 requests at
once, seed 0, 142,827 tokens of prompts and 133,966 to answer at temperature 0.6, none ends early.
`single` is one request, a prompt of 128 and 512 greedy tokens. Rates are output tokens over the
wall from the first request handed over to the last token; compilation and one warm-up turn are
outside it, and told apart. Transformers' continuous batching has two turns behind ours, in the same
run (`benchmarks.engine_gpu_peer`; a whole load was not yet waited for); ours are written before.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

from benchmarks.turns import Contestant
from jaxinfra.measure import Entry, environment, write
from jaxinfra.model.presets import PRESETS

MODEL, ROUNDS = "qwen3-0.6b", 5
PEER, PEER_ROUNDS = "transformers, continuous batching", 2
CONFIG = PRESETS[MODEL]
PROMPT, NEW_TOKENS = 128, 512
NO_GRAPHS = "--xla_gpu_enable_command_buffer="


def workload() -> list[tuple[list[int], int]]:
    """Prompts and how many tokens to answer, as nano-vllm draws them."""
    random.seed(0)
    prompts = [
        [random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)
    ]
    return [(prompt, random.randint(100, 1024)) for prompt in prompts]


def asked(load: str) -> list[tuple[list[int], int]]:
    """Prompts of a load and how many tokens to answer."""
    if load == "workload":
        return workload()
    random.seed(1)
    return [([random.randint(0, 10000) for _ in range(PROMPT)], NEW_TOKENS)]


def kernels(engine: Any, requests: list[Any]) -> None:
    """Prints what the device's time goes to in 20 steps, behind the prompts, to stderr."""
    from jaxinfra.measure.device_time import _extension

    for request in requests:
        engine.add(request)
    while not engine.scheduler.steady:
        engine.step()
    for _ in range(4):
        engine.step()
    extension = _extension()
    extension._cupti_init()
    start = time.perf_counter()
    for _ in range(20):
        engine.step()
    wall = time.perf_counter() - start
    times: dict[str, list[float]] = {}
    for name, milliseconds in extension._cupti_get_timings(True):
        times.setdefault(name[:60], []).append(milliseconds)
    print(f"20 steps: {wall * 1e3:.1f} ms, kernels {sum(map(sum, times.values())):.1f} ms",
          file=sys.stderr)  # fmt: skip
    for name, spent in sorted(times.items(), key=lambda pair: -sum(pair[1]))[:24]:
        print(f"{sum(spent):9.2f} ms {len(spent):6d}  {name}", file=sys.stderr)
    for request in requests:
        engine.abort(request.id)
    while engine.has_work():
        engine.step()


def ours(load: str, profiled: bool = False, **changes: Any) -> dict[str, Any]:
    """Turns of one load in this process, and what the engine says of itself."""
    import jax
    import jax.numpy as jnp

    from decode.config import EngineConfig
    from decode.engine import Engine
    from decode.request import Request, SamplingParams
    from decode.runner import Runner
    from jaxinfra.hardware.detect import here
    from jaxinfra.model.cache import unstack
    from jaxinfra.model.params import init

    if load == "workload":
        size = {"max_len": 2048, "max_running": 256, "budget": 4096, "pages": 320_000 // 16}
        params = {"temperature": 0.6, "ignore_eos": True}
    else:
        size = {"max_len": 1024, "max_running": 1, "budget": 256, "pages": 128}
        params = {"temperature": 0.0, "ignore_eos": True}
    weights = jax.jit(lambda key: unstack(init(key, CONFIG, jnp.bfloat16), CONFIG))(
        jax.random.key(0)
    )
    jax.block_until_ready(weights)
    begun = time.perf_counter()
    config = EngineConfig(**size, prefix_cache=False, **changes)
    runner = Runner(weights, CONFIG, config)
    engine = Engine(runner, None, config)
    ready = time.perf_counter() - begun
    engine.finish()
    complete = time.perf_counter() - begun

    def turn() -> dict[str, float]:
        before, count = engine.stats(), 0
        start = time.perf_counter()
        requests = [
            Request(str(i), tuple(prompt), SamplingParams(max_tokens=tokens, seed=i, **params))
            for i, (prompt, tokens) in enumerate(asked(load))
        ]
        first = None
        for output in engine.generate(requests):
            count += len(output.token_ids)
            first = first or time.perf_counter()
        end = time.perf_counter()
        stats = engine.stats()
        steps = stats.steps - before.steps
        assert count == sum(tokens for _, tokens in asked(load)), count
        answering = end - (first or start)
        return {
            "rate": count / (end - start), "after_first": (count - 1) / answering,
            "first_s": (first or end) - start, "steps": steps,
            "host_ms": (stats.host_s - before.host_s) / steps * 1e3,
        }  # fmt: skip

    turn()
    turns = [turn() for _ in range(ROUNDS)]
    if profiled:
        requests = [
            Request(str(i), tuple(prompt), SamplingParams(max_tokens=tokens, seed=i, **params))
            for i, (prompt, tokens) in enumerate(asked(load))
        ]
        kernels(engine, requests)
    return {
        "turns": turns, "ready_s": ready, "complete_s": complete,
        "programs": engine.stats().programs, "compiles": engine.stats().compiles,
        "bandwidth": here().bandwidth,
        "weights": sum(a.nbytes for a in jax.tree.leaves(weights)) - weights.embed.nbytes,
    }  # fmt: skip


def run(env: dict[str, str], *argument: Any) -> dict[str, Any]:
    """`python -m benchmarks.engine_gpu ARGUMENT...` in a process of its own; its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine_gpu", json.dumps(argument)],
        stdout=subprocess.PIPE, text=True, env=os.environ | env, timeout=400,
    )  # fmt: skip
    if done.returncode:
        return {"failed": done.returncode}
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer(load: str) -> list[float]:
    """Rates of transformers' turns; none where it fails, which is told."""
    contestant = Contestant("benchmarks.engine_gpu_peer", load)
    try:
        return [contestant.turn()["rate"] for _ in range(PEER_ROUNDS)]
    except RuntimeError as error:
        print(f"{PEER}: {error}", flush=True)
        return []
    finally:
        contestant.close()


def main(loads: list[str]) -> None:
    """Every variant, a line each, and the ledger's entries."""
    with tempfile.TemporaryDirectory() as cache:
        kept = {
            "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"
        }  # fmt: skip
        variants = {
            "single": [
                ("single", kept), ("single, from the cache", kept),
                ("single, no command buffers", {"XLA_FLAGS": NO_GRAPHS}),
            ],
            "workload": [("workload", kept)],
        }  # fmt: skip
        for load in loads:
            for name, env in variants[load]:
                made = run(env, load, {})
                print(name, told(made), flush=True)
                if "failed" not in made and name == load:
                    out = os.environ.get("OUT", "benchmarks/results")
                    write(entry(load, made, []), out)
                    rates = peer(load)
                    print(f"{PEER}: {[round(rate) for rate in rates]} tokens/s", flush=True)
                    write(entry(load, made, rates), out)


def told(made: dict[str, Any]) -> dict[str, Any]:
    """The medians of the turns, and what else there is."""
    turns = made.get("turns", [])
    figures = {key: round(median(t[key] for t in turns), 3) for key in turns[0]} if turns else {}
    return figures | {k: v for k, v in made.items() if k != "turns"}


CLAIMS = {
    "workload": "256 requests at once, 142,827 prompt and 133,966 new tokens, temperature 0.6",
    "single": f"One greedy request of {PROMPT} prompt and {NEW_TOKENS} new tokens",
}


def entry(load: str, made: dict[str, Any], theirs: list[float]) -> Entry:
    """The ledger's entry of a load."""
    rates = [turn["rate"] for turn in made["turns"]]
    at_best = 38_100 if load == "workload" else made["bandwidth"] / made["weights"]
    return Entry(
        name=f"engine-qwen3-0-6b-{load}",
        claim=f"The engine: {CLAIMS[load]}; Qwen3-0.6B's shape, bfloat16, one GPU",
        command="python -m benchmarks.engine_gpu",
        unit="tokens/s",
        samples={"jaxinfra": rates} | ({PEER: theirs} if theirs else {}),
        ratio=median(rates) / median(theirs) if theirs else None,
        interval=(min(rates) / max(theirs), max(rates) / min(theirs)) if theirs else None,
        roofline=median(rates) / at_best,
        roof="38,100 tokens/s: all weights and all keys and values of each step at 4.3 TB/s"
        if load == "workload"
        else f"reading the weights once a token at {made['bandwidth'] / 1e12:.2f} TB/s",
        inputs="random weights, random tokens (nano-vllm's bench.py, seed 0)"
        if load == "workload"
        else "random weights, random tokens",
        mislead="random weights choose the same work as real ones, but no answer ends early; "
        "compilation and warm-up are outside; the interval is the extremes of the turns",
        environment=environment(),
        extra={k: v for k, v in told(made).items() if k != "rate"},
    )


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] not in CLAIMS:
        load, changes = json.loads(sys.argv[1])
        print(json.dumps(ours(load, **changes)))
    else:
        main(sys.argv[1:] or list(CLAIMS))
