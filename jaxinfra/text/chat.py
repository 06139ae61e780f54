"""Chat templates: messages to the text that a model was trained on.

The text equals that of transformers' `apply_chat_template`. The sandbox, which transformers' rules
and our bounds make, is `jaxinfra.text.sandbox`; whatever goes wrong in it is one UserError.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jinja2

from jaxinfra.errors import UserError
from jaxinfra.text.sandbox import SECONDS, SIZE, ChatEnvironment, deadline


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of `messages`, each with "role" and "content" (or "tool_calls"), by `template`.

    `tools` are JSON schemas. The template sees `variables` by their names, among them "bos_token"
    and the other special tokens. Keys whose value is None are left out of messages, as in
    transformers. Raises UserError on bad messages, on a template that fails or calls
    `raise_exception`, and on one that tries to leave the sandbox or runs beyond its bounds.
    """
    context = {
        "documents": None,
        **_plain(variables, "variables"),
        "messages": _check(messages),
        "tools": _plain(tools, "tools"),
        "add_generation_prompt": add_generation_prompt,
    }
    token = deadline.set(time.monotonic() + SECONDS)
    try:
        pieces, size = [], 0
        for piece in _compile(template).generate(context):
            pieces.append(piece)
            size += len(piece)
            if size > SIZE:
                raise OverflowError(f"writes more than {SIZE:,} characters")
        return "".join(pieces)
    except Exception as error:  # the template is a program: it may raise anything
        reason = str(error) or type(error).__name__
        raise UserError(f"chat template: {reason}; mend the template or the messages") from None
    finally:
        deadline.reset(token)


@functools.cache
def _environment() -> ChatEnvironment:
    return ChatEnvironment()


@functools.lru_cache
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _check(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: give a list of at least one {'role': ..., 'content': ...}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"messages[{i}]: a {type(message).__name__}, not a dictionary")
        message = {k: v for k, v in message.items() if v is not None}
        if not isinstance(message.get("role"), str):
            raise UserError(f"messages[{i}]: lacks a 'role' such as 'user'")
        if "content" not in message and "tool_calls" not in message:
            raise UserError(f"messages[{i}]: lacks a 'content'; give text")
        if not isinstance(message.get("content", ""), str | list):
            kind = type(message["content"]).__name__
            raise UserError(f"messages[{i}]: its content is a {kind}; give text")
        checked.append(_plain(message, f"messages[{i}]"))
    return checked


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON values: other objects have methods that the sandbox does not know."""
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise UserError(f"{where}: a {type(value).__name__} is not JSON; give text, numbers or lists")
