"""One call of a tool, from the model's text to what the model is told about it.

Whatever goes wrong is an observation with a named kind of error, never an exception: wrong
arguments, a failure, a time-out, a crash. Only cancellation passes through.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from agent.events import Retried, ToolFinished, ToolProgress
from agent.messages import ToolCall
from agent.processes import run_process
from agent.retry import attempts
from agent.tools import ArgumentError, Context, Tool, ToolFailed, stream_of

Tell = Callable[[Retried | ToolProgress], Awaitable[None]]

PARALLEL = 8  # calls of one turn that run at the same time
LARGEST = 10_000_000  # characters of a result that are looked at; the rest is not even copied
_WORKER = "import sys; sys.path[:] = {!r}; from agent.worker import main; main()"
# Escape sequences, and controls other than tab and newline: a terminal would obey them.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[P\]X^_].*?(?:\x1b\\|\x07|$)|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]",
    re.DOTALL,
)


def clean(text: str, most: int) -> str:
    """The text without terminal controls, at most `most` characters: its head and its tail."""
    size = len(text)
    if size > LARGEST:
        text = text[: LARGEST // 2] + text[-LARGEST // 2 :]
    text = _CONTROLS.sub("", text.replace("\r\n", "\n"))
    text = text.encode("utf-8", "replace").decode()  # lone surrogates have no JSON
    if len(text) > most:
        head = most * 3 // 4
        tail = most - head
        text = f"{text[:head]}\n[... {size - most:,} of {size:,} characters left out ...]\n" + (
            text[-tail:] if tail else ""
        )
    return text


async def execute(tool: Tool, call: ToolCall, context: Context, listen: Tell) -> ToolFinished:
    """Runs the call within its time, again where the tool allows it; returns its end."""
    began = time.monotonic()

    def finish(content: str, error: str | None = None) -> ToolFinished:
        text = clean(content, tool.max_result)
        tainted = tool.untrusted or bool(context.taints)
        return ToolFinished(call.id, text, error, tainted, time.monotonic() - began)

    try:
        arguments = tool.parse(call.arguments)
    except ArgumentError as error:
        return finish(f"error: {error}", "arguments")
    if tool.context:
        arguments = {tool.context: context, **arguments}

    async def tell(number: int, error: Exception) -> None:
        await listen(Retried("tool", number, f"{tool.name}: {_sentence(error)}"))

    try:
        return finish(await attempts(
            lambda: _once(tool, call, arguments, listen),
            lambda error: isinstance(error, tool.retry_on), tool.retries, tell,
        ))  # fmt: skip
    except ToolFailed as error:
        return finish(f"error: {error}", "failed")
    except _TimedOut:
        return finish(
            f"error: {tool.name} took longer than {tool.timeout:g} s and was ended", "timeout"
        )
    except Exception as error:
        return finish(f"error: {_sentence(error)}", "exception")


class _TimedOut(Exception):
    pass


async def _once(tool: Tool, call: ToolCall, arguments: dict[str, Any], listen: Tell) -> str:
    if tool.own_process:
        return await _in_process(tool, call)
    pieces: list[str] = []
    progressive = tool.kind.endswith("generator")
    with anyio.move_on_after(tool.timeout) as limit:
        async with contextlib.aclosing(stream_of(tool, arguments)) as results:
            async for piece in results:
                pieces.append(piece)
                if progressive:
                    await listen(ToolProgress(call.id, clean(piece, tool.max_result)))
    if limit.cancelled_caught:
        raise _TimedOut
    return "".join(pieces)


async def _in_process(tool: Tool, call: ToolCall) -> str:
    work = {
        "function": f"{tool.function.__module__}:{tool.function.__qualname__}",
        "arguments": call.arguments, "parent": os.getpid(),
    }  # fmt: skip
    ended = await run_process(
        [sys.executable, "-c", _WORKER.format(sys.path)],
        stdin=json.dumps(work).encode(), seconds=tool.timeout, max_output=LARGEST * 4,
    )  # fmt: skip
    if ended.ended_by == "time":
        raise _TimedOut
    if ended.ended_by == "output":
        raise ToolFailed(f"{tool.name} wrote more than {LARGEST:,} characters and was ended")
    try:
        answer = json.loads(ended.stdout)
    except ValueError:
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
        raise ToolFailed(f"{tool.name} ended with status {ended.code} {last[0]}".strip()) from None
    if "ok" in answer:
        return answer["ok"]
    if "failed" in answer:
        raise ToolFailed(answer["failed"])
    kind = next((e for e in tool.retry_on if e.__name__ == answer["error"]), None)
    message = f"{answer['error']}: {answer['message']}"
    raise kind(message) if kind else ToolFailed(message)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
