"""ReAct by text, for models that know no tool calls (Yao et al., 2022, arXiv:2210.03629).

    Thought: what to do
    Action: weather
    Action Input: {"city": "Oslo"}
    Observation: -3 degrees            <- written by us
    ...
    Final Answer: it freezes

`ReActModel(model)` is itself a Model: the loop sees calls and results as ever, the model behind
sees only text. A message is written the same way in every turn, so old turns stay cached.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from agent.messages import Message, ToolCall
from agent.model import Completion, Delta, Model, Request, TextDelta, ToolSpec

_RULES = """\
You can use these tools, one at a time:
{tools}

To use a tool, write exactly:
Thought: what to do next
Action: the tool's name
Action Input: its arguments, as one JSON object

You are then told the Observation. When you know the answer, write:
Thought: I know the answer
Final Answer: the answer"""
_ACTION = re.compile(r"^[ \t]*Action[ \t]*:[ \t]*(.+?)[ \t]*$", re.MULTILINE | re.IGNORECASE)
_INPUT = re.compile(r"^[ \t]*Action[ \t]+Input[ \t]*:[ \t]*", re.MULTILINE | re.IGNORECASE)
_FINAL = re.compile(r"^[ \t]*Final[ \t]+Answer[ \t]*:[ \t]*", re.MULTILINE | re.IGNORECASE)
_OBSERVATION = re.compile(r"^[ \t]*Observation[ \t]*:.*", re.MULTILINE | re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class ReActModel:
    """A model with tool calls, made of `inner`, a model with text alone."""

    inner: Model

    @property
    def name(self) -> str:
        return self.inner.name

    async def stream(self, request: Request) -> AsyncIterator[Delta | Completion]:
        """See Model; text is held back until it is known to be no call."""
        if not request.tools:
            async for item in self.inner.stream(request):
                yield item
            return
        async for item in self.inner.stream(as_text(request)):
            if isinstance(item, Completion):
                completion = parse(item, request)
                if completion.message.content:
                    yield TextDelta(completion.message.content)
                yield completion


def as_text(request: Request) -> Request:
    """The request without tools: their descriptions stand in the first message."""
    rules = _RULES.format(tools="\n".join(_describe(tool) for tool in request.tools))
    messages: list[Message] = []
    for message in request.messages:
        if message.role == "tool":
            observation = Message("user", f"Observation: {message.content}")
            # The observations of one turn are one message: templates want turns to alternate.
            if messages and messages[-1].role == "user":
                joined = f"{messages[-1].content}\n{observation.content}"
                messages[-1] = Message("user", joined)
            else:
                messages.append(observation)
        elif message.calls:
            written = "".join(
                f"\nAction: {call.name}\nAction Input: {call.arguments}" for call in message.calls
            )
            messages.append(Message("assistant", (message.content + written).lstrip("\n")))
        else:
            messages.append(message)
    if messages and messages[0].role == "system":
        messages[0] = Message("system", f"{messages[0].content}\n\n{rules}")
    else:
        messages.insert(0, Message("system", rules))
    stop = tuple(dict.fromkeys((*request.settings.stop, "Observation:")))
    settings = replace(request.settings, stop=stop)
    return Request(messages, settings=settings, session=request.session)


def parse(completion: Completion, request: Request) -> Completion:
    """A turn of text as a call or an answer. An observation that the model made up is cut off, and
    what follows neither an action nor a final answer is the answer as a whole."""
    text = _OBSERVATION.sub("", completion.message.content).rstrip()
    final, action = _FINAL.search(text), _ACTION.search(text)
    if action is not None and (final is None or action.start() < final.start()):
        given = _INPUT.search(text, action.end())
        written = text[given.end() : final.start() if final else None] if given else "{}"
        call = ToolCall("", action.group(1).strip("`'\"[]() "), _first_object(written))
        message = Message("assistant", text[: action.start()].rstrip(), (call,))
        return replace(completion, message=message, finish="calls")
    answer = text[final.end() :].strip() if final is not None else text
    named = {tool.name: tool for tool in request.tools}
    if request.tool_choice == "required" and len(named) == 1:
        # The one tool is the structured answer: what was written is meant as its argument.
        call = ToolCall("", next(iter(named)), _first_object(answer))
        return replace(completion, message=Message("assistant", "", (call,)), finish="calls")
    return replace(completion, message=Message("assistant", answer))


def _describe(tool: ToolSpec) -> str:
    return f"- {tool.name}: {tool.description} Arguments: {json.dumps(dict(tool.parameters))}"


def _first_object(text: str) -> str:
    """The first JSON object in the text, without the fences and words around it; else the text,
    whose fault the loop then tells."""
    start = text.find("{")
    if start >= 0:
        try:
            _, end = json.JSONDecoder().raw_decode(text[start:])
            return text[start : start + end]
        except (ValueError, RecursionError):
            pass
    return text.strip()
