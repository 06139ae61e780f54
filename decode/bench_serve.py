"""Load for any OpenAI server, and what its users would have felt.

    jaxinfra bench-serve --url http://127.0.0.1:8000/v1 --model m --requests 200 --rate 8

Fields (as vLLM's `bench serve` defines them), in seconds: TTFT, from sending to the first token;
E2E, to the last; TPOT, (E2E - TTFT) / (tokens - 1); ITL, between chunks. Tokens are the server's
own count (usage). Goodput counts requests that keep every bound given. The open loop sends when
Poisson's clock says so, whatever the server does; the closed loop keeps a number under way. Times
include this client: about 0.1 ms a chunk on one core, so one process loads some 5,000 chunks/s.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from rich.table import Table

from jaxinfra.errors import UserError

_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child")


@dataclass(frozen=True)
class Call:
    """One request of a load: what it says, how long the answer is, when it is sent."""

    prompt: str
    max_tokens: int
    at: float = 0.0  # seconds after the start; the closed loop does not look at it


@dataclass
class Sample:
    """What came of one Call. Seconds; `status` is 0 where the connection broke."""

    status: int
    prompt_tokens: int = 0
    tokens: int = 0
    cached: int = 0
    ttft: float = 0.0
    e2e: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def tpot(self) -> float:
        """Seconds a token after the first."""
        return (self.e2e - self.ttft) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Bounds:
    """What a request must keep to be good; None does not matter. Seconds."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def kept(self, sample: Sample) -> bool:
        """Whether `sample` was answered within them."""
        return sample.status == 200 and all(
            bound is None or getattr(sample, name) <= bound for name, bound in asdict(self).items()
        )


def synthetic(
    requests: int, *, words: int, answer: int, prefixes: int = 0, shared: int = 0,
    rate: float | None = None, seed: int = 0,
) -> list[Call]:  # fmt: skip
    """A load of random words; with `prefixes`, each prompt begins with one of so many texts of
    `shared` words. `rate` a second spaces them by Poisson's law."""
    draw = random.Random(seed)
    starts = [_text(draw, shared) for _ in range(prefixes)]
    at, calls = 0.0, []
    for number in range(requests):
        own = f"{number}: {_text(draw, words)}"
        prompt = f"{draw.choice(starts)} {own}" if starts else own
        calls.append(Call(prompt, answer, at))
        at += draw.expovariate(rate) if rate else 0.0
    return calls


def trace(path: Path, speed: float = 1.0) -> list[Call]:
    """A load from JSON lines {"prompt" or "prompt_tokens", "max_tokens", "timestamp" in seconds}.

    Where a line holds only a number of prompt tokens, about so many words stand for them; equal
    "prefix" numbers share a beginning of half the words. Raises UserError naming the line.
    """
    calls = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            prompt = row.get("prompt")
            if prompt is None:
                half = int(row["prompt_tokens"]) // 2
                start = random.Random(row.get("prefix", -number))
                prompt = f"{_text(start, half)} {_text(random.Random(number), half)}"
            calls.append(Call(prompt, int(row["max_tokens"]), float(row["timestamp"]) / speed))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}:{number}: not a line of a trace ({error!r})") from None
    return sorted(calls, key=lambda call: call.at)


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(_WORDS, k=words))


async def load(
    url: str, model: str, calls: Sequence[Call], *, concurrency: int | None = None, key: str = "",
    chat: bool = False, timeout: float = 600.0,
) -> tuple[list[Sample], float]:  # fmt: skip
    """Sends `calls`, each at its time, or with `concurrency` each when another has ended.

    Returns their samples in order, and the seconds all of it took. A refusal is a sample too.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    samples: list[Sample | None] = [None] * len(calls)
    async with httpx2.AsyncClient(timeout=timeout, limits=limits, headers=headers) as client:
        start = time.perf_counter()

        async def one(index: int) -> None:
            samples[index] = await _measure(client, url, model, calls[index], chat)

        if concurrency is None:
            async with asyncio.TaskGroup() as group:
                for index, call in enumerate(calls):
                    await asyncio.sleep(max(0.0, start + call.at - time.perf_counter()))
                    group.create_task(one(index))
        else:
            rest: Iterator[int] = iter(range(len(calls)))

            async def worker() -> None:
                for index in rest:
                    await one(index)

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())
        took = time.perf_counter() - start
    return [sample for sample in samples if sample is not None], took


async def _measure(
    client: httpx2.AsyncClient, url: str, model: str, call: Call, chat: bool
) -> Sample:
    said = [{"role": "user", "content": call.prompt}] if chat else call.prompt
    body = {
        "messages" if chat else "prompt": said, "model": model, "max_tokens": call.max_tokens,
        "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    path = "/chat/completions" if chat else "/completions"
    begun = time.perf_counter()
    sample, last, done = Sample(0), 0.0, False
    try:
        async with client.stream("POST", url + path, json=body) as response:
            sample.status = response.status_code
            if response.status_code != 200:
                sample.error = (await response.aread()).decode(errors="replace")[:200]
                return sample
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now = time.perf_counter()
                if line == "data: [DONE]":
                    done = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    sample.status, sample.error = 500, str(event["error"])[:200]
                    return sample
                if any(_says(choice) for choice in event["choices"]):
                    if last:
                        sample.gaps.append(now - last)
                    else:
                        sample.ttft = now - begun
                    last = now
                _count(sample, event.get("usage"))
        sample.e2e = last - begun
        if not done:
            sample.status, sample.error = 0, "the stream ended without [DONE]"
    except (httpx2.HTTPError, ValueError) as error:
        sample.status, sample.error = 0, f"{type(error).__name__}: {error}"
    return sample


def _says(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or choice
    return any(delta.get(key) for key in ("text", "content", "reasoning_content", "tool_calls"))


def _count(sample: Sample, usage: dict[str, Any] | None) -> None:
    if usage:
        sample.prompt_tokens = usage["prompt_tokens"]
        sample.tokens = usage["completion_tokens"]
        sample.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def summary(samples: Sequence[Sample], took: float, bounds: Bounds = Bounds()) -> dict[str, Any]:
    """The figures of a load that took so many seconds."""
    fine = [sample for sample in samples if sample.status == 200]
    prompt = sum(sample.prompt_tokens for sample in fine)
    made: dict[str, Any] = {
        "requests": len(samples),
        "answered": len(fine),
        "refused": sum(sample.status == 429 for sample in samples),
        "failed": sum(sample.status not in (200, 429) for sample in samples),
        "seconds": took,
        "requests_per_second": len(fine) / took,
        "goodput": sum(map(bounds.kept, samples)) / took,
        "prompt_tokens": prompt,
        "cached_tokens": sum(sample.cached for sample in fine),
        "output_tokens": sum(sample.tokens for sample in fine),
        "output_tokens_per_second": sum(sample.tokens for sample in fine) / took,
        "errors": sorted({sample.error for sample in samples if sample.error})[:5],
    }
    figures = {
        "ttft": [sample.ttft for sample in fine],
        "tpot": [sample.tpot for sample in fine if sample.tokens > 1],
        "itl": [gap for sample in fine for gap in sample.gaps],
        "e2e": [sample.e2e for sample in fine],
    }
    for name, values in figures.items():
        if values:
            p50, p90, p99 = np.percentile(values, (50, 90, 99))
            made[name] = {"mean": float(np.mean(values)), "median": float(p50),
                          "p90": float(p90), "p99": float(p99)}  # fmt: skip
    return made


def render(figures: dict[str, Any]) -> Table:
    """The figures as a table; latencies in milliseconds."""
    table = Table("", "mean", "median", "p90", "p99", title="latency, ms")
    for name in ("ttft", "tpot", "itl", "e2e"):
        if name in figures:
            values = [f"{1000 * figures[name][key]:.1f}" for key in figures[name]]
            table.add_row(name.upper(), *values)
    table.caption = (
        f"{figures['answered']} of {figures['requests']} answered, {figures['refused']} refused, "
        f"{figures['failed']} failed in {figures['seconds']:.1f} s\n"
        f"{figures['output_tokens_per_second']:.0f} output tokens/s, "
        f"{figures['requests_per_second']:.2f} requests/s, goodput {figures['goodput']:.2f}\n"
        f"{figures['cached_tokens']} of {figures['prompt_tokens']} prompt tokens cached"
    )
    for error in figures["errors"]:
        table.caption += f"\n{error}"
    return table
