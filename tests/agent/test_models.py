"""What every model must do: the conformance suite, and models that it must reject."""

import contextlib
import copy
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from agent.http_model import HTTPModel
from agent.messages import user
from agent.model import CallDelta, Completion, Model, Request, TextDelta, ToolSpec, Usage
from agent.react import ReActModel
from agent.scripted import ScriptedModel, call
from tests.agent.chat_server import serving, tool_call

TEXT = "It is 42: six  times\nseven."
TOOL = ToolSpec("multiply", "Multiplies.", {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"], "additionalProperties": False,
})  # fmt: skip


async def conformance(model: Model) -> None:
    """Fails with an AssertionError on a model that is not one. It must answer with `TEXT` where it
    is offered no tool, else with a call of `multiply`; sessions are "0", "1", ..."""
    assert model.name
    ask = Request((user("6 * 7?"),), session="0")
    before = copy.deepcopy(ask)
    said, end = await turn(model, ask)
    assert ask == before, "it changed what it was asked"
    assert end.message.role == "assistant" and end.message.content == TEXT
    assert not end.message.calls and end.finish == "stop"
    assert min(end.usage.input, end.usage.output) > 0 <= end.usage.cached <= end.usage.input
    assert "".join(d.text for d in said if isinstance(d, TextDelta)) in (TEXT, "")

    said, end = await turn(model, Request((user("6 * 7?"),), (TOOL,), session="1"))
    (made,) = end.message.calls
    assert (made.name, made.arguments.replace(" ", "")) == ("multiply", '{"a":6,"b":7}')
    assert end.finish == "calls"
    pieces = [d for d in said if isinstance(d, CallDelta)]
    assert "".join(d.arguments for d in pieces) in (made.arguments, "")
    assert all(d.index == 0 and d.name in ("multiply", "") for d in pieces)

    stream: Any = model.stream(ask)
    async with contextlib.aclosing(stream):
        async for _ in stream:
            break  # whoever listened has gone
    with anyio.CancelScope() as scope:
        scope.cancel()
        await turn(model, ask)
        raise AssertionError("it finished although it was cancelled")
    ends: dict[int, Completion] = {}

    async def one(i: int) -> None:
        tools = (TOOL,) if i % 2 else ()
        ends[i] = (await turn(model, Request((user(f"{i}?"),), tools, session=f"s{i}")))[1]

    async with anyio.create_task_group() as group:
        for i in range(6):
            group.start_soon(one, i)
    assert [bool(ends[i].message.calls) for i in range(6)] == [False, True] * 3


async def turn(model: Model, request: Request) -> tuple[list[Any], Completion]:
    said = [item async for item in model.stream(request)]
    ends = [item for item in said if isinstance(item, Completion)]
    assert len(ends) == 1 and said[-1] is ends[0], "a turn ends with one completion"
    return said[:-1], ends[0]


def scripted(request: Request) -> Any:
    return call("multiply", a=6, b=7) if request.tools else TEXT


def by_text(request: Request) -> str:
    offered = "multiply" in request.messages[0].content
    return 'Action: multiply\nAction Input: {"a": 6, "b": 7}' if offered else TEXT


def answer(body: dict) -> dict:
    called = {"tool_calls": [tool_call("c1", "multiply", a=6, b=7)]}
    return called if body.get("tools") else {"content": TEXT}


MODELS: dict[str, Callable[[str], Model]] = {
    "scripted": lambda url: ScriptedModel(scripted),
    "react": lambda url: ReActModel(ScriptedModel(by_text)),
    "http": lambda url: HTTPModel("m", url),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_conform(kind):
    with serving(answer=answer) as server:
        anyio.run(conformance, MODELS[kind](server.url))


class Wrong:
    """A model that is right but for what a subclass makes wrong."""

    name = "wrong"

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        async for item in ScriptedModel(scripted).stream(request):
            yield item


class Endless(Wrong):
    async def stream(self, request):
        async for item in super().stream(request):
            yield item
            if isinstance(item, Completion):
                yield TextDelta("more")


class Twice(Wrong):
    async def stream(self, request):
        async for item in super().stream(request):
            yield item
        yield item


class Silent(Wrong):
    async def stream(self, request):
        async for item in super().stream(request):
            if not isinstance(item, Completion):
                yield item


class Changing(Wrong):
    async def stream(self, request):
        request.messages[0].__dict__["content"] += "!"
        async for item in super().stream(request):
            yield item


class Garbled(Wrong):
    async def stream(self, request):
        async for item in super().stream(request):
            yield TextDelta(item.text.upper()) if isinstance(item, TextDelta) else item


class Uncounted(Wrong):
    async def stream(self, request):
        async for item in super().stream(request):
            if isinstance(item, Completion):
                item.__dict__["usage"] = Usage()
            yield item


class Deaf(Wrong):
    async def stream(self, request):
        with anyio.CancelScope(shield=True):
            items = [item async for item in super().stream(request)]
        for item in items:
            yield item


class Confused(Wrong):
    last: Any = ()

    async def stream(self, request):
        self.last = request.tools
        await anyio.sleep(0.001)
        async for item in super().stream(Request(request.messages, self.last)):
            yield item


@pytest.mark.parametrize("wrong", Wrong.__subclasses__())
def test_wrong_models_are_rejected(wrong):
    anyio.run(conformance, Wrong())
    with pytest.raises((AssertionError, ExceptionGroup)):
        anyio.run(conformance, wrong())
