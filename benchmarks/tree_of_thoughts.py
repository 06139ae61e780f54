"""One tree of thoughts three ways: over forks of an engine's sessions, and over stateless HTTP.

    python -m benchmarks.tree_of_thoughts      # ten minutes on two idle cores, four on one GPU

Breadth 8, beam 2, depth 3, every thought judged by the model: some 80 questions that share a task
of many tokens, as many asked side by side as the search allows. `forks` is EngineModel in this
process; the others are `jaxinfra serve` over the same weights and settings, without and with its
prefix cache, asked by HTTPModel. Each runs in a process of its own and they take turns; a task is
never asked twice, so that no turn finds what an earlier one left. Compilation and loading are
outside the clock. On a CPU the model is SmolLM2-135M; on a GPU the body of Qwen3-0.6B with random
weights and a small vocabulary, as no text is judged here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import anyio

from agent.http_model import HTTPModel
from agent.messages import user
from agent.model import Model, Settings
from agent.reason import Branch, by_value, tree_of_thoughts
from benchmarks.turns import Contestant, answer

BREADTH, BEAM, DEPTH, ROUNDS = 8, 2, 3, 5
NAMES = {
    "forks": "forks of a session", "http": "HTTP, no prefix cache",
    "http-cached": "HTTP, prefix cache",
}  # fmt: skip
SIZES = {  # words of the task, tokens of a thought, of a sequence, of a step
    "cpu": {"words": 200, "thought": 12, "max_len": 1024, "budget": 256},
    "gpu": {"words": 1500, "thought": 48, "max_len": 8192, "budget": 2048},
}
WORDS = [*"etaoinshrdlucmfw"]


def task(number: int, words: int) -> str:
    """A text that differs from every other one from its first words on."""
    body = " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(words))
    return f"Task {number}. Plan a walk by these notes: {body}."


async def search(model: Model, text: str, thought: int) -> dict[str, Any]:
    """Seconds of one search, its questions and its tokens."""
    settings = Settings(temperature=0.8, max_tokens=thought)
    root = Branch(model, (user(text),), settings=settings)
    began = time.perf_counter()
    found = await tree_of_thoughts(root, by_value(), breadth=BREADTH, beam=BEAM, depth=DEPTH)
    seconds = time.perf_counter() - began
    used = root.budget.usage
    return {"seconds": seconds, "nodes": len(found.nodes), "questions": root.budget.used_calls,
            "read": used.input, "cached": used.cached, "written": used.output}  # fmt: skip


def contend(name: str, folder: str, backend: str) -> None:
    """One contestant: a search for every line that comes."""
    size, numbers = SIZES[backend], itertools.count()
    with forking(folder, size) if name == "forks" else serving(name, folder, size) as model:

        def turn() -> dict[str, Any]:
            text = task(next(numbers), size["words"])
            return anyio.run(search, model, text, size["thought"])

        turn()
        answer(turn)


@contextlib.contextmanager
def forking(folder: str, size: dict[str, int]) -> Iterator[Model]:
    """The engine in this process."""
    import jaxinfra
    from agent.engine_model import EngineModel
    from decode.config import EngineConfig
    from decode.engine import Engine

    dtype = "float32" if size is SIZES["cpu"] else "bfloat16"
    loaded = jaxinfra.load(folder, dtype=dtype)
    config = EngineConfig(max_len=size["max_len"], budget=size["budget"], max_running=16)
    engine = Engine.of(loaded, config)
    engine.finish()
    with EngineModel(engine, loaded.tokenizer) as model:
        yield model


@contextlib.contextmanager
def serving(name: str, folder: str, size: dict[str, int]) -> Iterator[Model]:
    """A server in a process of its own, ready with all its programs."""
    command = [
        sys.executable, "-m", "jaxinfra", "serve", folder, "--name", "m", "--port", "0",
        "--max-len", str(size["max_len"]), "--budget", str(size["budget"]), "--max-running", "16",
        "--prefix-cache" if name == "http-cached" else "--no-prefix-cache",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://[0-9.:]+", process.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start")
            while True:
                with urllib.request.urlopen(found[0] + "/load") as told:
                    stats = json.load(told)["stats"]
                if stats and stats["ready"] == stats["programs"]:
                    break
                time.sleep(0.5)
            yield HTTPModel("m", found[0] + "/v1", timeout=600.0)
        finally:
            process.terminate()
            process.wait(30)


def write_random(folder: Path) -> None:
    """The body of Qwen3-0.6B with random weights, a tokenizer of bytes and pairs, a template.

    Whatever it draws is ASCII, so that text over HTTP is as long as the tokens that were drawn.
    """
    import jax
    import jax.numpy as jnp
    import tokenizers

    from jaxinfra.model.params import init
    from jaxinfra.model.presets import PRESETS
    from jaxinfra.text import Tokenizer
    from jaxinfra.text.stream import byte_alphabet
    from jaxinfra.weights.safetensors import save

    plain = Tokenizer.byte_level()
    made = json.loads(plain.backend.to_str())
    marks = {one["content"] for one in made["added_tokens"]}
    pairs = [(a, b) for a in "etaoinshrd" for b in "etaoinshrdlucm"][: 256 - 128]
    vocabulary = {token: i for i, token in enumerate(byte_alphabet()[:128])}
    vocabulary |= {a + b: 128 + i for i, (a, b) in enumerate(pairs)}
    vocabulary |= {token: i for token, i in made["model"]["vocab"].items() if token in marks}
    made["model"] |= {"vocab": vocabulary, "merges": [list(pair) for pair in pairs]}
    backend = tokenizers.Tokenizer.from_str(json.dumps(made))
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = Tokenizer(backend, plain.special, plain.eos_ids, template)
    config = replace(PRESETS["qwen3-0.6b"], vocab_size=tokenizer.vocab_size)
    save(folder, jax.jit(lambda key: init(key, config, jnp.bfloat16))(jax.random.key(0)), config)
    tokenizer.save(folder)


def main() -> None:
    """All in turns, then the ledger's entry."""
    probe = "import jax; print(jax.default_backend())"
    backend = subprocess.check_output([sys.executable, "-c", probe], text=True).strip()
    with tempfile.TemporaryDirectory() as made:
        folder = made
        if backend == "cpu":
            from jaxinfra.weights.pull import pull

            folder = str(pull("smollm2-135m"))
        else:
            subprocess.run([sys.executable, "-m", "benchmarks.tree_of_thoughts", "write"],
                           env=os.environ | {"TREE": made}, check=True)  # fmt: skip
        env = {"TREE": folder, "BACKEND": backend, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.28"}
        contestants = {n: Contestant("benchmarks.tree_of_thoughts", n, **env) for n in NAMES}
        turns: dict[str, list[dict]] = {name: [] for name in NAMES.values()}
        for turn in range(ROUNDS):
            for name in list(NAMES)[:: 1 if turn % 2 == 0 else -1]:
                turns[NAMES[name]].append(contestants[name].turn())
        for contestant in contestants.values():
            contestant.close()
    record(turns, backend)


def record(turns: dict[str, list[dict]], backend: str) -> None:
    """Prints medians and ratios and writes the ledger's entry."""
    from jaxinfra.measure import Entry, environment, write
    from jaxinfra.measure.compare import ratio_interval

    seconds = {name: [run["seconds"] for run in runs] for name, runs in turns.items()}
    middle = {name: median(values) for name, values in seconds.items()}
    ours, bare, cached = middle
    for name, runs in turns.items():
        told = ", ".join(f"{key} {runs[-1][key]}" for key in runs[-1] if key != "seconds")
        print(f"{name:24s} {middle[name]:7.2f} s; {told}")
    size = SIZES[backend]
    model = "SmolLM2-135M, float32" if backend == "cpu" else "Qwen3-0.6B's body, bfloat16"
    entry = Entry(
        name=f"tree-of-thoughts-{backend}",
        claim=f"a tree of thoughts of breadth {BREADTH}, beam {BEAM} and depth {DEPTH}, {model}",
        command="python -m benchmarks.tree_of_thoughts",
        unit="s",
        samples=seconds,
        ratio=middle[bare] / middle[ours],
        interval=ratio_interval(tuple(seconds[ours]), tuple(seconds[bare])),
        roofline=None,
        roof="none: reading tasks is bound by arithmetic, writing thoughts by memory",
        inputs=f"a task of {size['words']} words, thoughts of at most {size['thought']} tokens at "
        "temperature 0.8, judgements of at most 8",
        mislead="The longer the task is beside the thoughts, the more is gained; most of it is the "
        "prefix cache's, which HTTP can have too; encoding answers anew may change what follows",
        environment=environment(),
        extra={
            "over_http_with_prefix_cache": middle[cached] / middle[ours],
            "last_turns": {name: runs[-1] for name, runs in turns.items()},
        },
    )
    print(f"{entry.ratio:.2f} times {bare}; {middle[cached] / middle[ours]:.2f} times {cached}")
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    contestant = functools.partial(
        contend, sys.argv[-1], os.environ.get("TREE", ""), os.environ.get("BACKEND", "cpu")
    )
    if sys.argv[-1] == "write":
        write_random(Path(os.environ["TREE"]))
    else:
        (contestant if sys.argv[-1] in NAMES else main)()
