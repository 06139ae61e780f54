"""A model that says what a test tells it to, through the same interface as a real one."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio

from agent.messages import Message, ToolCall
from agent.model import CallDelta, Completion, Delta, Request, TextDelta, Usage
from jaxinfra.errors import UserError

Turn = str | Message | Completion | Exception


def call(name: str, id: str = "", /, **arguments: Any) -> Message:
    """A turn that calls one tool."""
    return Message("assistant", calls=(ToolCall(id, name, json.dumps(arguments)),))


def calls(*messages: Message) -> Message:
    """A turn that makes the calls of several at once."""
    return Message("assistant", calls=tuple(c for message in messages for c in message.calls))


class ScriptedModel:
    """Answers turn n with the n-th entry of a list, or with what a function of the request says.

    The turn's number is that of the assistant's messages in the request, so a script also serves a
    session that another process resumes. An exception is raised, once.
    """

    name = "scripted"

    def __init__(self, script: Sequence[Turn] | Callable[[Request], Turn], delay: float = 0.0):
        """`delay` is seconds before each delta."""
        self._script = script if callable(script) else list(script)
        self._delay = delay
        self.requests: list[Request] = []

    async def stream(self, request: Request) -> AsyncIterator[Delta | Completion]:
        self.requests.append(request)
        turn = self._turn(request)
        if isinstance(turn, Exception):
            raise turn
        end = turn if isinstance(turn, Completion) else _completion(turn)
        await anyio.sleep(self._delay)
        for word in re.findall(r"\s*\S+\s*", end.message.content):
            yield TextDelta(word)
            await anyio.sleep(self._delay)
        for i, made in enumerate(end.message.calls):
            yield CallDelta(i, made.name, made.arguments)
        read = sum(len(message.content.split()) for message in request.messages)
        written = len(end.message.content.split()) + len(end.message.calls)
        yield replace(end, usage=Usage(read, written)) if end.usage == Usage() else end

    def _turn(self, request: Request) -> Turn:
        if callable(self._script):
            return self._script(request)
        said = sum(message.role == "assistant" for message in request.messages)
        if said >= len(self._script):
            raise UserError(
                f"the script has {len(self._script)} turns and turn {said + 1} is asked"
            )
        if isinstance(self._script[said], Exception):
            return self._script.pop(said)
        return self._script[said]


def _completion(turn: str | Message) -> Completion:
    message = Message("assistant", turn) if isinstance(turn, str) else turn
    return Completion(message, finish="calls" if message.calls else "stop")
