"""The Berkeley Function-Calling Leaderboard, version 4, by its own data and checkers.

    with BFCL() as bench:
        tries = await evaluate(make, lambda repeat: bench.tasks("simple_python", 50))
    jaxinfra agent eval --suite bfcl --names simple_python multi_turn_base --url ...

The data, the simulators and the checkers are those of the wheel `bfcl-eval`, which pins versions
that we cannot have, so it lives in an environment of its own (40 MB, made at the first use) and
`bfcl_worker` answers from there. In single-turn categories the first turn of the model counts; in
multi-turn ones every call runs in a simulator and the checker compares states turn by turn.
Categories that search the web or need a vendor's embedder are left out.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from agent.evaluate.environment import environment
from agent.evaluate.runner import Stage, Task
from agent.limits import Limits
from agent.loop import Result
from agent.messages import Message
from agent.tools import ANY_ARGUMENTS, Tool, ToolFailed
from jaxinfra.errors import UserError

# The wheel, and what its loader, checkers and simulators import; not the 30 clients it asks for.
PACKAGES = ("bfcl-eval==2026.3.23", "mpmath==1.3.0", "filelock==3.20.0", "tenacity>=8.5,<10",
            "tree_sitter==0.21.3", "tree-sitter-java==0.21.0",
            "tree-sitter-javascript==0.21.4")  # fmt: skip
SINGLE = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel",
          "parallel_multiple", "irrelevance", "live_simple", "live_multiple", "live_parallel",
          "live_parallel_multiple", "live_irrelevance", "live_relevance")  # fmt: skip
MULTI = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param",
         "multi_turn_long_context")  # fmt: skip
_STEPS = 20  # of the model in one turn; the leaderboard's own bound


class BFCL:
    """The benchmark, while the block lasts."""

    def __init__(self) -> None:
        python = environment("bfcl", PACKAGES, dependencies=False)
        worker = Path(__file__).with_name("bfcl_worker.py")
        self._process = subprocess.Popen(
            [python, "-I", worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._alone = threading.Lock()
        self._worlds = itertools.count()

    def __enter__(self) -> BFCL:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def tasks(self, category: str, most: int | None = None) -> list[Task]:
        """The first `most` tasks of a category (all by default). Raises UserError for one that is
        not there."""
        if category not in (*SINGLE, *MULTI):
            raise UserError(
                f"BFCL: no category {category!r}; there are {', '.join(SINGLE + MULTI)}"
            )
        entries = self._ask("load", category, most)
        return [self._task(category, i, entry) for i, entry in enumerate(entries)]

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._alone:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise UserError(f"BFCL: its process ended with status {self._process.wait(30)}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"BFCL: {answer['error']}")
        return answer["ok"]

    def _task(self, category: str, index: int, entry: dict[str, Any]) -> Task:
        id, world = entry["id"], f"world{next(self._worlds)}"

        def check(result: Result) -> str | None:
            return self._ask("check", category, id, world, calls_by_turn(result))

        def tool(told: dict[str, Any]) -> Tool:
            def call(**arguments: Any) -> str:
                if category in SINGLE:
                    return "noted"  # the run ends here: only what was called counts
                try:
                    return self._ask("execute", category, id, world, [told["name"], arguments])
                except UserError as error:
                    raise ToolFailed(str(error)) from None

            return Tool(told["name"], told["description"], call, ANY_ARGUMENTS, effects="pure",
                        schema=told["parameters"], serial=True)  # fmt: skip

        stages = tuple(
            Stage(tuple(Message(m["role"], m["content"]) for m in turn),
                  tools=tuple(map(tool, entry["later"].get(str(i), ()))))
            for i, turn in enumerate(entry["turns"])
        )  # fmt: skip
        turns = 1 if category in SINGLE else _STEPS
        options = {"instructions": "", "limits": Limits(turns=turns, tool_calls=None)}
        return Task(category, index, stages, tuple(map(tool, entry["tools"])), check, (), options)


def calls_by_turn(result: Result) -> list[list[list[list[Any]]]]:
    """The model's calls as turns of steps of [name, arguments]; None for arguments that are no JSON
    object. A turn begins with what the user says."""
    turns: list[list[list[list[Any]]]] = []
    asking = False
    for message in result.state.messages:
        if message.role in ("user", "system"):
            turns += [] if asking else [[]]
            asking = True
        elif message.role == "assistant":
            asking = False
            turns[-1].append([[call.name, _object(call.arguments)] for call in message.calls])
    return turns


def _object(text: str) -> dict[str, Any] | None:
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
