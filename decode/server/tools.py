"""What a model writes, told apart as it comes: reasoning, content, tool calls.

`Reader.push` takes text in pieces of any size; the pieces it gives, joined by kind and call, are
the same however the text was cut, so that a streamed answer is the answer. Arguments stream as they
are written. What only looked like a call (no name, not JSON) is content, to the letter.

Formats: Hermes, Qwen's too: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; and Llama
3's: the message is `{"name": ..., "parameters": {...}}`, several of them set apart by `;`.
Reasoning stands in `<think>...</think>` before anything else. Cost: O(1) a character in Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["hermes", "llama"]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_THINK, _END_THINK = "<think>", "</think>"
_PYTHON_TAG = "<|python_tag|>"
# A call whose name is first can be streamed from its arguments' first brace on.
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)


@dataclass(frozen=True)
class Delta:
    """A piece of the answer. A call begins with its name; `index` counts the calls from 0."""

    kind: Literal["content", "reasoning", "name", "arguments"]
    text: str
    index: int = 0


class Reader:
    """Reads one answer. Without a `format`, calls are content; without `thinking`, so are thoughts.

    thinking: "open" where the prompt already ends in `<think>`, "may" where the answer may begin
      with it.
    names: the tools' names; in Llama's format, which marks calls by nothing else, only these count.
    """

    def __init__(
        self,
        format: Format | None = None,
        names: Sequence[str] = (),
        thinking: Literal["open", "may"] | None = None,
    ) -> None:
        self._thoughts = _Thoughts(thinking == "open") if thinking else None
        self._answer = (
            _Hermes() if format == "hermes" else _Llama(names) if format == "llama" else _Content()
        )

    def push(self, text: str) -> list[Delta]:
        """What is certain now and was not before."""
        given: list[Delta] = []
        if self._thoughts is not None:
            after = self._thoughts.push(text, given)
            if after is None:
                return _joined(given)
            self._answer.trim = self._thoughts.inside
            text, self._thoughts = after, None
        self._answer.push(text, given)
        return _joined(given)

    def finish(self) -> list[Delta]:
        """What was held back; the answer is over."""
        given: list[Delta] = []
        if self._thoughts is not None:
            self._answer.push(self._thoughts.finish(given), given)
        self._answer.finish(given)
        return _joined(given)


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of one kind as one; empty ones left out."""
    made: list[Delta] = []
    for delta in deltas:
        last = made[-1] if made else None
        if last and delta.kind != "name" and (last.kind, last.index) == (delta.kind, delta.index):
            made[-1] = Delta(delta.kind, last.text + delta.text, delta.index)
        elif delta.text:
            made.append(delta)
    return made


def _certain(text: str, tag: str) -> int:
    """How much of `text` neither begins `tag` nor is white space that may stand before it."""
    end = next(len(text) - n for n in range(len(tag) - 1, -1, -1) if text.endswith(tag[:n]))
    return len(text[:end].rstrip())


class _Thoughts:
    """`<think>`, thoughts, `</think>`; white space around them is dropped."""

    def __init__(self, inside: bool) -> None:
        self.inside, self._held, self._told = inside, "", False

    def push(self, text: str, given: list[Delta]) -> str | None:
        """Appends thoughts to `given`; returns what comes after them once they are over."""
        self._held += text
        if not self.inside:
            start = self._held.lstrip()
            if len(start) < len(_THINK) and _THINK.startswith(start):
                return None
            if not start.startswith(_THINK):
                return self._held
            self.inside, self._held = True, start[len(_THINK) :]
        thoughts, found, after = self._held.partition(_END_THINK)
        if found:
            self._tell(thoughts.rstrip(), given)
            return after
        certain = _certain(self._held, _END_THINK)
        self._tell(self._held[:certain], given)
        self._held = self._held[certain:]
        return None

    def finish(self, given: list[Delta]) -> str:
        """The answer ended in their midst: what is left of them, and of what were none."""
        if not self.inside:
            return self._held
        self._tell(self._held, given)
        return ""

    def _tell(self, text: str, given: list[Delta]) -> None:
        text = text if self._told else text.lstrip()
        self._told = self._told or bool(text)
        given.append(Delta("reasoning", text))


class _Content:
    """Text as it is; with `trim`, without the white space at its beginning."""

    def __init__(self) -> None:
        self.trim = False

    def push(self, text: str, given: list[Delta]) -> None:
        if self.trim:
            text = text.lstrip()
            self.trim = not text
        given.append(Delta("content", text))

    def finish(self, given: list[Delta]) -> None:
        pass


class _Call:
    """One call's JSON, character by character: so no cut can matter."""

    def __init__(self, index: int, names: Sequence[str] | None = None) -> None:
        self.index, self.raw, self.streams = index, "", False
        self.depth, self.in_text = 0, False  # of the JSON read so far
        self._names, self._escaped = names, False
        self._inner: int | None = None  # the depth that arguments, being streamed, stand in

    def take(self, character: str, given: list[Delta]) -> None:
        """Reads on; appends the name, and arguments as they come."""
        before = self.depth
        if not self.streams and not self.in_text and character == "{":
            head = _HEAD.fullmatch(self.raw)
            name = _loads(head[1]) if head else None
            if isinstance(name, str) and self._known(name):
                given.append(Delta("name", name, self.index))
                self.streams, self._inner = True, before
        self._step(character)
        if not self.streams:
            self.raw += character
        elif self._inner is not None:
            given.append(Delta("arguments", character, self.index))
            self._inner = self._inner if self.depth > self._inner else None

    def whole(self, given: list[Delta]) -> bool:
        """The call that could not be streamed, its arguments first or absent, if it is one."""
        call = _loads(self.raw)
        if not isinstance(call, dict) or not self._known(call.get("name")):
            return False
        arguments = call.get("arguments", call.get("parameters"))
        arguments = {} if arguments is None else arguments
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        given.append(Delta("name", call["name"], self.index))
        given.append(Delta("arguments", text, self.index))
        return True

    def _known(self, name: Any) -> bool:
        named = isinstance(name, str) and name != ""
        return named and (self._names is None or name in self._names)

    def _step(self, character: str) -> None:
        if self.in_text:
            self.in_text = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self.in_text = True
        else:
            self.depth += (character in "{[") - (character in "}]")


class _Hermes:
    """Content and calls between tags; white space around a call is dropped."""

    def __init__(self) -> None:
        self.trim = False
        self._held, self._calls, self._opening = "", 0, ""
        self._call: _Call | None = None

    def push(self, text: str, given: list[Delta]) -> None:
        while text:
            text = self._content(text, given) if self._call is None else self._within(text, given)

    def _content(self, text: str, given: list[Delta]) -> str:
        held = self._held + text
        content, found, after = held.partition(_OPEN)
        if found:
            shown = content.rstrip()
            self._tell(shown, given)
            self._opening = content[len(shown) :] + _OPEN
            self._held, self._call = "", _Call(self._calls)
            return after
        certain = _certain(held, _OPEN)
        self._tell(held[:certain], given)
        self._held = held[certain:]
        return ""

    def _within(self, text: str, given: list[Delta]) -> str:
        """Reads a call; `_held` is the beginning of what may be its closing tag."""
        call = self._call
        assert call is not None
        for i, character in enumerate(text):
            tag = self._held + character
            if not call.in_text and tag == _CLOSE:
                self._end(call, _CLOSE, given)
                return text[i + 1 :]
            if not call.in_text and _CLOSE.startswith(tag):
                self._held = tag
                continue
            for one in self._held:
                call.take(one, given)
            self._held = character if character == "<" and not call.in_text else ""
            if not self._held:
                call.take(character, given)
        return ""

    def _end(self, call: _Call, closed: str, given: list[Delta]) -> None:
        self._held, self._call = "", None
        if call.streams or call.whole(given):
            self._calls += 1
            self.trim = True
        else:
            self._tell(self._opening + call.raw + closed, given)

    def _tell(self, text: str, given: list[Delta]) -> None:
        text = text.lstrip() if self.trim else text
        self.trim = self.trim and not text
        given.append(Delta("content", text))

    def finish(self, given: list[Delta]) -> None:
        if self._call is None:
            self._tell(self._held, given)
        else:
            self._end(self._call, self._held, given)


class _Llama:
    """The answer is calls, set apart by `;`, or else it is content."""

    def __init__(self, names: Sequence[str]) -> None:
        self.trim = False
        self._names, self._held, self._calls, self._opening = names, "", 0, ""
        self._call: _Call | None = None
        self._content: _Content | None = None

    def push(self, text: str, given: list[Delta]) -> None:
        for i, character in enumerate(text):
            if self._content is not None:
                self._content.push(text[i:], given)
                return
            if self._call is None:
                self._between(character, given)
            if self._call is not None:
                self._call.take(character, given)
                if self._call.depth == 0:
                    self._end(self._call, given)

    def _between(self, character: str, given: list[Delta]) -> None:
        """Before the first call: white space or the tag; between calls: also one `;`."""
        held = self._held + character
        start = held.lstrip()
        if self._calls:
            start = start.removeprefix(";").lstrip()
        elif start.startswith(_PYTHON_TAG):
            start = start[len(_PYTHON_TAG) :].lstrip()
        if start == "{":
            self._call = _Call(self._calls, self._names)
            self._opening, self._held = "" if self._calls else held[:-1], ""
        elif not start or (not self._calls and _PYTHON_TAG.startswith(start)):
            self._held = held
        else:
            self._give_up(start if self._calls else held, given)

    def _end(self, call: _Call, given: list[Delta]) -> None:
        self._call = None
        if call.streams or call.whole(given):
            self._calls += 1
        else:
            self._give_up(self._opening + call.raw, given)

    def _give_up(self, text: str, given: list[Delta]) -> None:
        self._content = _Content()
        self._content.trim = self.trim or self._calls > 0
        self._content.push(text, given)

    def finish(self, given: list[Delta]) -> None:
        if self._call is not None:
            self._end(self._call, given)
        elif self._content is None and not self._calls:
            self._give_up(self._held, given)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
