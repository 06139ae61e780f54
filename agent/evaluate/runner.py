"""Runs an agent over tasks, several times each, and says how well it does and how surely.

pass^k (Yao et al., 2024, tau-bench, arXiv:2406.12045) is the chance that k tries in a row all
succeed: what somebody relies on, where pass@k is what somebody hopes for. Intervals are Wilson's at
95 % over tasks' tries; tries of one task are alike, so with few tasks they are too narrow.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from agent.events import ModelResponded, OutputRejected, ToolFinished
from agent.gather import gather
from agent.journal import MemoryStore, Store
from agent.loop import Result, run
from agent.messages import Message
from agent.spec import Agent
from agent.tools import Tool


@dataclass(frozen=True)
class Stage:
    """What is asked next, in the conversation `session` of the task. Most tasks are one stage;
    memory needs two conversations. `tools` are there from this stage on."""

    prompt: str | tuple[Message, ...]
    session: str = ""
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Task:
    """A fresh world with its tools, what is asked, and the check of how it ended.

    `check` sees the last result and says what is wrong, or None. `calls` are the calls that a
    perfect run makes, for the accuracy of arguments; empty means that none is wanted. `options` are
    fields of the agent that tries it.
    """

    kind: str
    seed: int
    stages: tuple[Stage, ...]
    tools: tuple[Tool, ...]
    check: Callable[[Result], str | None]
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Try:
    """One try at a task. `malformed` of its `called` tool calls did not parse; `right` of the
    wanted calls were made."""

    kind: str
    seed: int
    repeat: int
    fault: str | None
    reason: str
    turns: int
    tokens: int
    cost: float
    seconds: float
    called: int
    malformed: int
    errors: int
    right: int
    wanted: int
    session: str

    @property
    def passed(self) -> bool:
        return self.fault is None


@dataclass(frozen=True)
class Line:
    """A kind of task: shares are 0 to 1, `low` and `high` bound `success`; `arguments` and
    `recovery` are NaN where no call was wanted and none failed; `cost` is that of all tries for
    each success."""

    kind: str
    success: float
    low: float
    high: float
    pass_k: float
    malformed: float
    arguments: float
    recovery: float
    turns: float
    tokens: float
    seconds: float
    cost: float


async def evaluate(
    make: Callable[[Task], Agent], tasks: Callable[[int], Sequence[Task]], *, repeats: int = 4,
    width: int = 8, store: Store | None = None,
    progress: Callable[[Try], None] = lambda one: None,
) -> list[Try]:  # fmt: skip
    """Tries each task `repeats` times, `width` side by side. `tasks(repeat)` builds the worlds anew
    for each repeat, as they have state; `make` builds the agent for a task."""
    kept = store or MemoryStore()

    async def one(task: Task, repeat: int) -> Try:
        done = await _try(make(task), task, repeat, kept)
        progress(done)
        return done

    work = (partial(one, task, repeat) for repeat in range(repeats) for task in tasks(repeat))
    return sorted(await gather(work, width), key=lambda t: (t.kind, t.seed, t.repeat))


async def _try(agent: Agent, task: Task, repeat: int, store: Store) -> Try:
    began = time.monotonic()
    base = f"{task.kind}-{task.seed}-{repeat}"
    agent = replace(agent, tools=(*agent.tools, *task.tools), **task.options)
    result: Result | None = None
    sessions: dict[str, None] = {}
    try:
        for stage in task.stages:
            name = base + stage.session
            agent = replace(agent, tools=(*agent.tools, *stage.tools))
            sessions[name] = None
            result = await run(agent, stage.prompt, store=store, session=name)
            if result.reason not in ("done", "waiting"):
                break
        assert result is not None
        fault = task.check(result)
    finally:
        task.close()
    events = [r.event for name in sessions for r in await store.read(name)]
    turns = [e for e in events if isinstance(e, ModelResponded)]
    ended = [e for e in events if isinstance(e, ToolFinished)]
    made = [(c.name, c.arguments) for e in turns for c in e.message.calls]
    return Try(
        task.kind, task.seed, repeat, fault, result.reason, len(turns),
        sum(e.usage.input + e.usage.output for e in turns), sum(e.usage.cost for e in turns),
        time.monotonic() - began, len(made),
        sum(e.error in ("arguments", "unknown_tool") for e in ended)
        + sum(isinstance(e, OutputRejected) for e in events),
        sum(e.error is not None for e in ended), _right(task, made), len(task.calls), base,
    )  # fmt: skip


def _right(task: Task, made: Sequence[tuple[str, str]]) -> int:
    """How many of the wanted calls were made with their arguments, each counted once."""
    tools = {tool.name: tool for tool in task.tools}
    left = []
    for name, text in made:
        try:
            left.append((name, tools[name].parse(text)))
        except (KeyError, ValueError):
            continue
    right = 0
    for wanted in task.calls:
        if wanted in left:
            left.remove(wanted)
            right += 1
    return right


def summary(tries: Sequence[Try], k: int = 4) -> list[Line]:
    """A line for each kind, and one for all."""
    by_kind: dict[str, list[Try]] = defaultdict(list)
    for one in tries:
        by_kind[one.kind].append(one)
    kinds = sorted(by_kind)
    return [_line(kind, by_kind[kind], k) for kind in kinds] + [_line("all", list(tries), k)]


def _line(kind: str, tries: list[Try], k: int) -> Line:
    n, passed = len(tries), sum(t.passed for t in tries)
    low, high = wilson(passed, n)
    failing = [t for t in tries if t.errors]
    wanted = sum(t.wanted for t in tries)
    called = sum(t.called for t in tries)
    return Line(
        kind, passed / n, low, high, pass_hat(tries, k),
        sum(t.malformed for t in tries) / called if called else 0.0,
        sum(t.right for t in tries) / wanted if wanted else math.nan,
        sum(t.passed for t in failing) / len(failing) if failing else math.nan,
        sum(t.turns for t in tries) / n, sum(t.tokens for t in tries) / n,
        sum(t.seconds for t in tries) / n,
        sum(t.cost for t in tries) / passed if passed else math.inf,
    )  # fmt: skip


def pass_hat(tries: Sequence[Try], k: int) -> float:
    """The mean over tasks of the unbiased estimate of pass^k, C(c, k) / C(n, k) for c of n tries
    passed; `k` is cut to the fewest tries of a task."""
    by_task: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for one in tries:
        by_task[one.kind, one.seed].append(one.passed)
    k = min(k, *map(len, by_task.values()))
    shares = [math.comb(sum(p), k) / math.comb(len(p), k) for p in by_task.values()]
    return sum(shares) / len(shares)


def wilson(passed: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a share (1927), at 95 %."""
    if n == 0:
        return 0.0, 1.0
    p, z = passed / n, 1.96
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


INSTRUCTIONS = (
    "Use the tools when they help; do not guess what a tool can tell. When you know the answer, "
    "say it and nothing else. If nothing you have can answer, say exactly: I cannot."
)
