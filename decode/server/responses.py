"""OpenAI's Responses: a chat by other words. Nothing is kept, so the whole input comes each time.

Source of the items and events: platform.openai.com/docs/api-reference/responses (and -streaming).
A request becomes a ChatRequest; the answer's items and events are folded from a chat's chunks, so
all that holds for chats (a stream is the answer) holds here. This module imports no jax.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from decode.server.protocol import (
    ChatRequest,
    Failure,
    Function,
    encode,
    from_validation,
)


class ResponseFunction(Function):
    """A tool, as Responses write it."""

    type: Literal["function"]


class _Choice(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    name: str


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: _Format = _Format()
    verbosity: str | None = None


class _Reasoning(BaseModel):
    model_config = ConfigDict(extra="ignore")
    effort: str | None = None


class ResponsesRequest(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: str = ""
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[ResponseFunction], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _Choice | None = None
    parallel_tool_calls: bool | None = None
    text: _Text = _Text()
    reasoning: _Reasoning | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None
    # Read, and without effect here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    include: list[str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    truncation: Literal["disabled", "auto"] | None = None
    stream_options: dict[str, Any] | None = None
    # Refused: there is nothing kept to refer to.
    previous_response_id: None = None
    background: Literal[False] | None = None


def to_chat(body: ResponsesRequest) -> ChatRequest:
    """The chat that says the same. Raises Failure with status 400."""
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    for at, item in enumerate(items):
        _add(messages, item, at)
    choice: Any = body.tool_choice
    if isinstance(choice, _Choice):
        choice = {"type": "function", "function": {"name": choice.name}}
    form = body.text.format
    asked: dict[str, Any] = {
        "model": body.model, "messages": messages, "stream": bool(body.stream),
        "max_completion_tokens": body.max_output_tokens, "temperature": body.temperature,
        "top_p": body.top_p, "tool_choice": choice, "prompt_cache_key": body.prompt_cache_key,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "tools": [
            {"type": "function", "function": tool.model_dump(exclude={"type"})}
            for tool in body.tools or ()
        ] or None,
        "response_format": {"type": form.type},
    }  # fmt: skip
    if form.type == "json_schema":
        schema = {"name": form.name, "schema": form.schema_ or {}, "strict": form.strict}
        asked["response_format"]["json_schema"] = schema
    try:
        return ChatRequest.model_validate(asked)
    except ValidationError as error:
        raise from_validation(error.errors()) from None


def _add(messages: list[dict[str, Any]], item: dict[str, Any], at: int) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        if isinstance(content, list):
            content = "".join(_text_of(part, at) for part in content)
        role = item.get("role")
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if messages and "tool_calls" in messages[-1]:
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        output = item.get("output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind != "reasoning":  # what was thought before is not said again
        raise Failure(400, f"input: no items of type {kind!r} here", param=f"input.{at}.type")


def _text_of(part: Any, at: int) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise Failure(400, "this model reads text alone", param=f"input.{at}.content")
    return text


class ResponseAnswer:
    """One response: what it holds so far, and the events of its stream."""

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._finish: str | None = None
        asked = body.model_dump(by_alias=True, exclude_none=True)
        self._head = {
            "id": f"resp_{secrets.token_hex(16)}", "object": "response",
            "created_at": int(time.time()), "model": model, "error": None,
            "instructions": body.instructions, "metadata": body.metadata or {},
            "max_output_tokens": body.max_output_tokens, "temperature": body.temperature,
            "top_p": body.top_p, "tools": asked.get("tools", []),
            "tool_choice": asked.get("tool_choice", "auto"), "text": asked["text"],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False,
        }  # fmt: skip

    def begin(self) -> list[bytes]:
        """The events before anything is said."""
        state = {"response": self.body(None)}
        return [self._event(f"response.{kind}", state) for kind in ("created", "in_progress")]

    def take(self, chunk: dict[str, Any]) -> list[bytes]:
        """Reads a chunk of the chat; the events that it makes."""
        choice = chunk["choices"][0]
        self._finish = choice["finish_reason"] or self._finish
        delta, made = choice["delta"], []
        if delta.get("reasoning_content"):
            made += self._text("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            made += self._text("message", delta["content"])
        for call in delta.get("tool_calls", ()):
            made += self._call(call)
        return made

    def end(self, usage: Any) -> list[bytes]:
        """The last events; `usage` is an answers.Usage."""
        made = self._close()
        whole = self.body(usage)
        return [*made, self._event(f"response.{whole['status']}", {"response": whole})]

    def fail(self, failure: Failure) -> bytes:
        """The event of an answer that cannot be ended."""
        error = {"code": "server_error", "message": str(failure)}
        state = {**self.body(None), "status": "failed", "error": error}
        return self._event("response.failed", {"response": state})

    def body(self, usage: Any) -> dict[str, Any]:
        """The response; without `usage`, as of one that is in progress."""
        cut = self._finish == "length"
        told = usage and {
            "input_tokens": usage.prompt, "output_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
        return {
            **self._head,
            "status": "in_progress" if usage is None else "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": list(self._items),
            "usage": told,
        }

    def _text(self, kind: str, text: str) -> list[bytes]:
        part_kind = "output_text" if kind == "message" else "reasoning_text"
        made: list[bytes] = []
        if not self._open(kind):
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            item: dict[str, Any] = {"type": kind, "id": f"{kind[:3]}_{secrets.token_hex(16)}"}
            item |= {"status": "in_progress", "content": [part]}
            if kind == "message":
                part["annotations"] = []
                item["role"] = "assistant"
            else:
                item["summary"] = []
            made += self._add_item(item)
            made.append(self._event("response.content_part.added", {**self._at(0), "part": part}))
        self._items[-1]["content"][0]["text"] += text
        said = {**self._at(0), "delta": text}
        if kind == "message":
            said["logprobs"] = []
        return [*made, self._event(f"response.{part_kind}.delta", said)]

    def _call(self, call: dict[str, Any]) -> list[bytes]:
        made = []
        function = call["function"]
        if "id" in call:
            made += self._add_item(
                {"type": "function_call", "id": f"fc_{secrets.token_hex(16)}",
                 "call_id": call["id"], "name": function["name"], "arguments": "",
                 "status": "in_progress"}
            )  # fmt: skip
        if function["arguments"]:
            self._items[-1]["arguments"] += function["arguments"]
            said = {**self._at(), "delta": function["arguments"]}
            made.append(self._event("response.function_call_arguments.delta", said))
        return made

    def _open(self, kind: str) -> bool:
        last = self._items[-1] if self._items else None
        return bool(last and last["type"] == kind and last["status"] == "in_progress")

    def _add_item(self, item: dict[str, Any]) -> list[bytes]:
        made = self._close()
        self._items.append(item)
        place = {"output_index": len(self._items) - 1, "item": {**item, "content": []}}
        return [*made, self._event("response.output_item.added", place)]

    def _close(self) -> list[bytes]:
        """Ends the item under way, if there is one."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item = self._items[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            said = {**self._at(), "arguments": item["arguments"], "name": item["name"]}
            made = [self._event("response.function_call_arguments.done", said)]
        else:
            part = item["content"][0]
            said = {**self._at(0), "text": part["text"]}
            if item["type"] == "message":
                said["logprobs"] = []
            made = [
                self._event(f"response.{part['type']}.done", said),
                self._event("response.content_part.done", {**self._at(0), "part": part}),
            ]
        place = {"output_index": len(self._items) - 1, "item": item}
        return [*made, self._event("response.output_item.done", place)]

    def _at(self, content: int | None = None) -> dict[str, Any]:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if content is None else {**place, "content_index": content}

    def _event(self, kind: str, said: dict[str, Any]) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **said}
        self._number += 1
        return f"event: {kind}\ndata: ".encode() + encode(body) + b"\n\n"
