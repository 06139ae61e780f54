"""A server at four times its capacity for five minutes: nothing lost, memory flat, then it drains.

    python -m benchmarks.serve_under_load              # about six minutes
    python -m benchmarks.serve_under_load --seconds 30

SmolLM2-135M by `jaxinfra serve` in a process of its own, four answers at once and sixteen that may
wait. Capacity is what a closed loop of eight clients gets for twenty seconds. Then requests come by
Poisson's law at four times that rate, one in ten of them with priority (interactive); each must be
answered whole or refused with 429 and a Retry-After. At the end, with answers under way, SIGTERM:
those must still come whole, and the process must end by it.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import tyro

from jaxinfra.measure import Entry, environment, write

MODEL, TOKENS, RUNNING, WAITING = "smollm2-135m", 16, 4, 16
URGENT = -10  # the lower goes first


@dataclass
class Heard:
    """What came of one request."""

    urgent: bool
    status: int
    seconds: float
    whole: bool
    retry_after: str | None = None


@dataclass
class Server:
    """The process, where it listens, and what memory it had when."""

    process: subprocess.Popen
    url: str
    memory: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Notes the bytes in memory of the server and of its engine."""
        found = subprocess.run(
            ["ps", "-o", "rss=", "--pid", str(self.process.pid), "--ppid", str(self.process.pid)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        self.memory.append(1024 * sum(map(int, found.stdout.split())))


def start() -> Server:
    """A server that is ready."""
    command = [
        sys.executable, "-m", "jaxinfra", "serve", MODEL, "--port", "0", "--max-len", "512",
        "--max-running", str(RUNNING), "--max-waiting", str(WAITING), "--budget", "64",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://[0-9.:]+", line):
            server = Server(process, found[0])
            break
    else:
        raise RuntimeError("the server did not start")
    while True:
        try:
            if httpx.get(server.url + "/health", timeout=5).status_code == 200:
                return server
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


async def ask(client: httpx.AsyncClient, number: int, urgent: bool = False) -> Heard:
    """One completion of TOKENS tokens."""
    words = random.Random(number).choices(("time", "year", "people", "way", "day"), k=20)
    body = {
        "model": MODEL, "prompt": f"{number}: " + " ".join(words), "max_tokens": TOKENS,
        "temperature": 0, "ignore_eos": True, "priority": URGENT if urgent else 0,
    }  # fmt: skip
    begun = time.perf_counter()
    try:
        answer = await client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        print(f"lost: {type(error).__name__} {error}", file=sys.stderr)
        return Heard(urgent, 0, time.perf_counter() - begun, False)
    taken = time.perf_counter() - begun
    whole = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == TOKENS
    return Heard(urgent, answer.status_code, taken, whole, answer.headers.get("retry-after"))


async def closed(client: httpx.AsyncClient, clients: int, seconds: float) -> float:
    """Answers a second that so many clients get, each asking when it has its answer."""
    end, count = time.perf_counter() + seconds, 0

    async def one(i: int) -> None:
        nonlocal count
        asked = 0
        while time.perf_counter() < end:
            heard = await ask(client, 1000 * i + asked)
            asked += 1
            count += heard.whole

    begun = time.perf_counter()
    await asyncio.gather(*(one(i) for i in range(clients)))
    return count / (time.perf_counter() - begun)


async def open_loop(
    client: httpx.AsyncClient, server: Server, rate: float, seconds: float
) -> list[Heard]:
    """What came of requests by Poisson's law."""
    draw, tasks = random.Random(0), []
    begun = time.perf_counter()
    at, looked = begun, begun
    while at < begun + seconds:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(client, len(tasks), draw.random() < 0.1)))
        at += draw.expovariate(rate)
        if at - looked > seconds / 20:
            server.look()
            looked = at
    return list(await asyncio.gather(*tasks))


async def drain(client: httpx.AsyncClient, server: Server) -> tuple[list[Heard], int]:
    """Answers under way when SIGTERM came, and the process's exit status."""
    tasks = [asyncio.create_task(ask(client, 10**6 + i)) for i in range(RUNNING)]
    await asyncio.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    heard = list(await asyncio.gather(*tasks))
    return heard, await asyncio.to_thread(server.process.wait, 60)


async def load(server: Server, seconds: float) -> dict[str, Any]:
    """Everything in turn; the figures."""
    limits = httpx.Limits(max_connections=1000)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        await closed(client, RUNNING, 5)
        capacity = await closed(client, 2 * RUNNING, 20)
        server.look()
        heard = await open_loop(client, server, 4 * capacity, seconds)
        alive = (await client.get("/health")).status_code
        last, status = await drain(client, server)
    ok = [h for h in heard if h.status == 200]
    refused = [h for h in heard if h.status == 429]
    p99 = {
        name: float(np.percentile([h.seconds for h in ok if h.urgent == urgent], 99))
        for name, urgent in (("interactive", True), ("other", False))
    }
    share = {
        name: float(np.mean([h.status == 200 for h in heard if h.urgent == urgent]))
        for name, urgent in (("interactive", True), ("other", False))
    }
    # All that may stand before an accepted request, at the measured rate, and half as much again.
    bound = 1.5 * (RUNNING + WAITING + 1) / capacity
    return {
        "capacity": capacity, "asked": len(heard), "answered": len(ok), "refused": len(refused),
        "lost": len(heard) - len(ok) - len(refused), "cut short": sum(not h.whole for h in ok),
        "without Retry-After": sum(not h.retry_after for h in refused),
        "seconds at p99": p99, "bound": bound, "share answered": share,
        "memory": server.memory, "health": alive,
        "whole while draining": sum(h.whole for h in last), "exit status": status,
    }  # fmt: skip


def main(seconds: float = 300.0) -> None:
    """Runs it, tells every figure, writes the ledger's entry; ends with 1 where a promise broke."""
    server = start()
    try:
        figures = asyncio.run(load(server, seconds))
    finally:
        server.process.kill()
    for name, value in figures.items():
        print(f"{name}: {value}")
    early, late = (float(np.mean(part)) for part in np.array_split(figures["memory"], 2))
    broken = [
        name for name, wrong in {
            "answers lost": figures["lost"], "answers cut short": figures["cut short"],
            "refused without a Retry-After": figures["without Retry-After"],
            "p99 above its bound": max(figures["seconds at p99"].values()) > figures["bound"],
            "interactive ones behind":
                figures["seconds at p99"]["interactive"] > figures["seconds at p99"]["other"],
            "memory grew by a tenth": late > 1.1 * early, "not healthy": figures["health"] != 200,
            "not drained": figures["whole while draining"] < RUNNING
            or figures["exit status"] not in (0, -signal.SIGTERM),
        }.items() if wrong
    ]  # fmt: skip
    if seconds >= 300:
        answered = figures["answered"] / seconds
        write(
            Entry(
                name="serve-under-load-cpu",
                claim="A server at four times its capacity for five minutes, SmolLM2-135M, CPU",
                command="python -m benchmarks.serve_under_load", unit="answers/s",
                samples={"jaxinfra": [answered]}, ratio=None, interval=None,
                roofline=answered / figures["capacity"],
                roof="what a closed loop of eight clients gets",
                inputs=f"20 words, {TOKENS} tokens answered; one in ten with priority",
                mislead="one run; client and server share the cores", environment=environment(),
                extra=figures,
            ),
            Path(os.environ.get("OUT", "benchmarks/results")),
        )  # fmt: skip
    print("broken: " + ", ".join(broken) if broken else "every promise was kept")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    tyro.cli(main)
