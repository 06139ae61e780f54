"""The tour's stage of serving: a real server, ten chats at once, a prefix, a draft, a JSON answer.

    python -m jaxinfra tour --only serve

The server is the command `jaxinfra serve` in a process of its own; what is shown came over HTTP.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from jaxinfra.errors import UserError
from jaxinfra.tour.shell import Tour
from jaxinfra.tour.speak import MODEL
from jaxinfra.weights.pull import pull

SYSTEM = "You are a helpful guide through a museum of computers. Answer in one short sentence."
TOPICS = (
    "the abacus", "punched cards", "vacuum tubes", "the transistor", "magnetic tape", "the mouse",
    "floppy disks", "the first web page", "home computers", "graphics cards",
)  # fmt: skip
POEM = "one fish two fish red fish blue fish one fish two fish red fish blue fish one fish two"
SCHEMA = {
    "type": "object",
    "properties": {
        "machine": {"type": "string", "maxLength": 20},
        "year": {"type": "integer", "minimum": 1800, "maximum": 2026},
        "kind": {"enum": ["mechanical", "electronic"]},
    },
    "required": ["machine", "year", "kind"],
    "additionalProperties": False,
}
_ENGINE = ["--max-len", "512", "--max-running", "4", "--budget", "64", "--draft", "4"]


def stage(tour: Tour) -> None:
    """Serves SmolLM2-135M; raises UserError, which the tour tells, where it cannot be had."""
    pull(MODEL)
    section = tour.report.section("A server under load")
    tour.console.print("a server starts, and compiles for a few shapes")
    with _server() as (url, seconds):
        tour.console.print(f"jaxinfra serve {MODEL}: ready after {seconds:.0f} s")
        seen, chats, took = asyncio.run(_chats(url, 12 if tour.quick else 24))
        tokens = sum(chat["tokens"] for chat in chats)
        line = (
            f"Ten chats at once, four of them running at a time: {tokens} tokens in {took:.1f} s; "
            f"{sum(chat['cached'] > 0 for chat in chats)} found the shared instructions in the "
            "prefix cache."
        )
        tour.console.print(line)
        section.text(line)
        section.table(
            f"{MODEL}, float32, greedy: ten streamed chats",
            ("about", "first token (s)", "whole (s)", "prompt", "of it cached", "answer"),
            [(c["about"], round(c["first"], 2), round(c["whole"], 2), c["prompt"], c["cached"],
              c["text"][:60]) for c in chats],
        )  # fmt: skip
        section.figure("Pages of keys and values while the chats ran", _drawn(seen))
        answer = json.loads(_json(url))
        section.text("A JSON answer, held to its schema token by token:")
        section.verbatim(json.dumps(answer))
        tour.console.print(f"a JSON answer: {answer}", highlight=False)
        drafted, accepted = _drafted(url)
        line = f"Drafts from what was said before: {drafted} tokens guessed, {accepted} stood."
        tour.console.print(line)
        section.text(line)


@contextmanager
def _server() -> Iterator[tuple[str, float]]:
    """A server process: its address, and seconds until it took requests."""
    command = [sys.executable, "-m", "jaxinfra", "serve", MODEL, "--port", "0", *_ENGINE]
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            found = re.search(r"http://[0-9.:]+", process.stdout.readline())
            if found is None:
                last = process.stderr.read().strip().splitlines()[-1:]
                raise UserError(f"the server did not start: {' '.join(last)}")
            yield found[0], time.perf_counter() - start
        finally:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


async def _chats(url: str, most: int) -> tuple[list[dict[str, int]], list[dict[str, Any]], float]:
    """What the engine told meanwhile, what came of each chat, and seconds in all."""
    seen: list[dict[str, int]] = []

    async def watch() -> None:
        while True:
            stats = (await client.get(url + "/load")).json()["stats"]
            if stats:
                seen.append({"at": time.perf_counter() - start} | stats)
            await asyncio.sleep(0.1)

    async def chat(about: str) -> dict[str, Any]:
        begun = time.perf_counter()
        body = {
            "messages": [{"role": "system", "content": SYSTEM},
                         {"role": "user", "content": f"Tell me about {about}."}],
            "max_tokens": most, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        said: dict[str, Any] = {"about": about, "text": "", "first": 0.0}
        async with client.stream("POST", url + "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                for choice in chunk["choices"]:
                    if text := choice["delta"].get("content"):
                        said["first"] = said["first"] or time.perf_counter() - begun
                        said["text"] += text
                if usage := chunk.get("usage"):
                    details = usage.get("prompt_tokens_details") or {}
                    said |= {
                        "prompt": usage["prompt_tokens"], "tokens": usage["completion_tokens"],
                        "cached": details.get("cached_tokens") or 0,
                    }  # fmt: skip
        return said | {"whole": time.perf_counter() - begun}

    async with httpx2.AsyncClient(timeout=300) as client:
        start = time.perf_counter()
        watching = asyncio.create_task(watch())
        chats = await asyncio.gather(*map(chat, TOPICS))
        took = time.perf_counter() - start
        watching.cancel()
    return seen, chats, took


def _json(url: str) -> str:
    body = {
        "messages": [{"role": "user", "content": "Name an old computer and its year, as JSON."}],
        "max_tokens": 60, "temperature": 0.0,
        "response_format": {"type": "json_schema",
                            "json_schema": {"name": "machine", "schema": SCHEMA}},
    }  # fmt: skip
    answer = httpx2.post(url + "/v1/chat/completions", json=body, timeout=300).json()
    return answer["choices"][0]["message"]["content"]


def _drafted(url: str) -> tuple[int, int]:
    """Tokens guessed and tokens that stood, of a text that repeats itself."""

    def stats() -> dict[str, Any]:
        return httpx2.get(url + "/load", timeout=30).json()["stats"]

    end = time.monotonic() + 120
    while (told := stats())["ready"] < told["programs"] and time.monotonic() < end:
        time.sleep(0.5)  # drafts begin when all programs are there
    body = {"prompt": POEM, "max_tokens": 48, "temperature": 0.0}
    httpx2.post(url + "/v1/completions", json=body, timeout=300).raise_for_status()
    time.sleep(0.5)  # until the engine has told its figures again
    told = stats()
    return told["drafted"], told["accepted"]


def _drawn(seen: list[dict[str, int]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    kinds = ("pages_used", "pages_cached", "pages_free")
    at = [one["at"] for one in seen]
    axes.stackplot(
        at, [[one[kind] for one in seen] for kind in kinds],
        labels=["of running chats", "kept prefixes", "free"],
        colors=["#d2691e", "#4682b4", "#dddddd"],
    )  # fmt: skip
    axes.set_xlabel("seconds")
    axes.set_ylabel("pages of 16 tokens")
    axes.legend(loc="center right")
    return figure
