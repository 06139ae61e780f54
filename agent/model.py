"""The one interface between the loop and whatever produces text.

A model turns a `Request` into a stream: any number of deltas, then exactly one `Completion`, which
alone counts. The request always holds the whole conversation. A model that owns its tokens (an
engine in this process) keys its cache by `Request.session` and reads `Message.tokens` of its own
earlier turns, so it encodes nothing but the messages that are new; one behind HTTP ignores both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from agent.messages import Message, ToolCall, to_openai


@dataclass(frozen=True)
class ToolSpec:
    """A tool as the model sees it; `parameters` is a JSON schema of an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to draw an answer; None leaves the choice to the model."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One turn that is asked of a model.

    `session` names the conversation: a cache key, never content. `schema` forces the whole answer
    into a JSON schema. `tool_choice` "required" forces a call, a tool's name a call of that one,
    and "none" forbids calls; else the model chooses.
    """

    messages: Sequence[Message]
    tools: Sequence[ToolSpec] = ()
    tool_choice: str = "auto"
    settings: Settings = field(default_factory=Settings)
    schema: Mapping[str, Any] | None = None
    session: str = ""

    @property
    def program(self) -> str:
        """The run that this turn is part of, with its forks and sub-agents, `RUN/...`."""
        return self.session.partition("/")[0]


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str
    type: Literal["text_delta"] = "text_delta"


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of what a reasoning model thinks aloud; it never enters the conversation."""

    text: str
    type: Literal["reasoning_delta"] = "reasoning_delta"


@dataclass(frozen=True)
class CallDelta:
    """A piece of the arguments of the call number `index` of this turn."""

    index: int
    name: str
    arguments: str
    type: Literal["call_delta"] = "call_delta"


Delta = TextDelta | ReasoningDelta | CallDelta


@dataclass(frozen=True)
class Usage:
    """Tokens of one turn; `cached` of the `input` ones were not computed again. `cost` in dollars,
    or in whatever unit the model's price is given."""

    input: int = 0
    output: int = 0
    cached: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input + other.input, self.output + other.output, self.cached + other.cached,
            self.cost + other.cost,
        )  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """The end of a turn. `finish` "length" means that the text was cut at `max_tokens`."""

    message: Message
    usage: Usage = field(default_factory=Usage)
    finish: Literal["stop", "calls", "length", "filter"] = "stop"


class Model(Protocol):
    """Anything that can take a turn."""

    @property
    def name(self) -> str:
        """Which model it is, for journals, traces and prices."""
        ...

    def stream(self, request: Request) -> AsyncIterator[Delta | Completion]:
        """Yields deltas, then one Completion.

        Raises TransportError where the same request may succeed later, UserError where it never
        will. Closing the iterator early must stop the work behind it.
        """
        ...


def openai_body(request: Request, messages: Sequence[Message]) -> dict[str, Any]:
    """The request over `messages` in the form of OpenAI's chat completions, without a model."""
    settings, choice = request.settings, request.tool_choice
    body: dict[str, Any] = {
        "messages": [to_openai(message) for message in messages],
        "temperature": settings.temperature, "top_p": settings.top_p,
        "max_tokens": settings.max_tokens, "seed": settings.seed,
        "stop": list(settings.stop) or None,
    }  # fmt: skip
    if request.tools:
        named = {"type": "function", "function": {"name": choice}}
        body["tool_choice"] = choice if choice in ("auto", "required", "none") else named
        body["tools"] = [
            {"type": "function", "function": {
                "name": t.name, "description": t.description, "parameters": dict(t.parameters)}}
            for t in request.tools
        ]  # fmt: skip
    if request.schema is not None:
        schema = {"name": "answer", "schema": dict(request.schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {key: value for key, value in body.items() if value is not None}


async def complete(model: Model, request: Request) -> Completion:
    """The end of one turn, for whoever does not watch it come. Raises what `Model.stream` does."""
    async for item in model.stream(request):
        if isinstance(item, Completion):
            return item
    raise TransportError(f"{model.name}: the stream ended without an end")


class Parts:
    """A message as its pieces come: each is kept, and returned as the delta that it is."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: dict[int, list[str]] = {}  # id, name and pieces of arguments, by index

    def text(self, piece: str) -> TextDelta:
        self._text.append(piece)
        return TextDelta(piece)

    def call(self, index: int, name: str = "", arguments: str = "", id: str = "") -> CallDelta:
        """A piece of a call; its id and its name may come once, with any of them."""
        call = self._calls.setdefault(index, ["", ""])
        call[0] = id or call[0]
        call[1] += name
        call.append(arguments)
        return CallDelta(index, call[1], arguments)

    def message(self, tokens: tuple[int, ...] | None = None) -> Message:
        made = (call for _, call in sorted(self._calls.items()))
        calls = tuple(ToolCall(id, name, "".join(rest)) for id, name, *rest in made)
        return Message("assistant", "".join(self._text), calls, tokens=tokens)


class TransportError(Exception):
    """The model could not be reached, or asked to be left alone for `after` seconds."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class Price:
    """Dollars a million tokens."""

    input: float = 0.0
    output: float = 0.0
    cached: float = 0.0

    def usage(self, input: int, output: int, cached: int) -> Usage:
        """What a turn used; `cached` tokens are part of `input` ones and priced apart."""
        cost = (input - cached) * self.input + cached * self.cached + output * self.output
        return Usage(input, output, cached, cost / 1e6)
