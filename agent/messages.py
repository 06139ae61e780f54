"""What a conversation is made of: messages, and the calls of tools inside them.

A message of the assistant may carry `tokens`, the ids that a token-exact model drew for it. They
travel with it through the journal, so that the next turn appends to them and never encodes the same
text twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it: `arguments` is text that ought to be a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One entry of a conversation; `calls` are the assistant's, `call_id` is a tool's."""

    role: Role
    content: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None
    tokens: tuple[int, ...] | None = None


def user(text: str) -> Message:
    return Message("user", text)


def same_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many entries, messages or tokens, both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def to_openai(message: Message) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        entry["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.calls
        ]
    if message.call_id is not None:
        entry["tool_call_id"] = message.call_id
    return entry
