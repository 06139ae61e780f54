"""What holds a model to calls that its tools take, as a grammar: `held` and `offered`.

A call that is asked for is the whole answer. Where the model may call or not, its words are free
until it begins a call (`<tool_call>`, or in Llama's format an answer that begins with a brace) and
from there on it can write nothing but a call, to the closing tag: a lazy grammar, which masks
nothing in between. What it thinks aloud is free throughout. This module imports no jax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from decode.grammar import JSON_STYLE
from decode.request import Grammar
from decode.server.protocol import Function
from decode.server.tools import Format

Schema = Mapping[str, Any]
_END = r'"\n" body "\n</tool_call>"'
_HERMES = rf"""
call: open rest
rest: {_END}
open[lazy]: TEXT "<tool_call>"
"""
# Until it is closed, a thought may hold the tag that opens a call.
_HERMES_MAY_THINK = r"""
first[lazy]: PLAIN "<tool_call>"
PLAIN: TEXT & ~THOUGHT
"""
_LLAMA = r"""
OPEN: /\s*(<\|python_tag\|>\s*)?/
PLAIN: TEXT & ~/\s*(<\|python_tag\|>\s*)?\{(?s:.*)/
"""
_THOUGHTS = r"""
thoughts[lazy]: THOUGHT "</think>"
"""
_TEXT = "\nTEXT: /(?s:.*)/\n"


def held(tools: Sequence[Function], style: Format, many: bool, answer: Schema | None) -> Grammar:
    """One call, or with `many` some; or else, where `answer` is a schema, JSON by it."""
    body = f"body: %json {_calls(tools, style, lenient=False)}"
    if style == "llama":
        start = "body"
    else:
        start, body = ("call+" if many else "call"), f'call: "<tool_call>" {_END}\n{body}'
    if answer is not None:
        start += " | answer"
        body += "\nanswer: %json " + json.dumps({"x-guidance": JSON_STYLE, **answer})
    return Grammar("lark", f"start: {start}\n{body}")


def offered(
    tools: Sequence[Function], style: Format, many: bool, thinking: Literal["open", "may"] | None
) -> Grammar:
    """Words, and the calls that stand among them: at most one, or with `many` any number.

    thinking: as `decode.server.tools.Reader` has it. A keyword of a schema that the library does
    not know holds only functions that are `strict`, which are refused for it.
    """
    body = f"body: %json {_calls(tools, style, lenient=not any(t.strict for t in tools))}"
    if style == "llama":
        start = "PLAIN | OPEN body" + (" (/ ?; ?/ body)*" if many else "")
        rules = _LLAMA
        starts = {None: start, "open": f"thoughts ({start}) | TEXT",
                  "may": f"thoughts ({start}) | {start}"}  # fmt: skip
    else:
        rules, more = _HERMES, "call* TEXT" if many else "(TEXT | call)"
        after = "call* TEXT" if many else ""
        starts = {None: more, "open": f"thoughts {more} | TEXT",
                  "may": f"thoughts {more} | first rest {after} | TEXT"}  # fmt: skip
        rules += _HERMES_MAY_THINK if thinking == "may" else ""
    if thinking is not None:
        begins = r"\s*<think>" if thinking == "may" else ""
        rules += _THOUGHTS + f"THOUGHT: /{begins}(?s:.*)/"
    return Grammar("lark", f"start: {starts[thinking]}\n{rules}{_TEXT}{body}", lazy=True)


def _calls(tools: Sequence[Function], style: Format, lenient: bool) -> str:
    """The JSON schema of a call to any of `tools`."""
    key = "arguments" if style == "hermes" else "parameters"
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                key: _moved(tool.parameters or {"type": "object"}, f"#/anyOf/{i}/properties/{key}"),
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    return json.dumps({"x-guidance": {**JSON_STYLE, "lenient": lenient}, "anyOf": calls})


def _moved(schema: Any, to: str) -> Any:
    """The schema with its references into itself (`#/$defs/...`) as seen from its place, `to`."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: to + value[1:] if key == "$ref" and isinstance(value, str) and value[:1] == "#"
        else _moved(value, to)
        for key, value in schema.items()
    }  # fmt: skip
