"""From the engine's outputs to OpenAI's bodies and chunks.

A whole answer is folded from the very deltas that a stream sends, so the two cannot differ.
This module imports no jax.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from decode.server.protocol import Failure
from decode.server.tools import Delta, Reader
from jaxinfra.text import Tokenizer
from jaxinfra.text.stream import byte_alphabet

if TYPE_CHECKING:
    from decode.request import Output

_BYTES = {character: byte for byte, character in enumerate(byte_alphabet())}


@dataclass
class Usage:
    """Tokens of one HTTP request, over its prompts and choices."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def body(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class _Choice:
    """What one choice has come to so far."""

    reader: Reader
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: Any = None
    finish: str | None = None
    stop_reason: Any = None
    offset: int = 0  # characters before the next token's, for a completion's logprobs


class Answer:
    """One HTTP request's choices; `chat` tells the two kinds of bodies apart.

    logprobs: how many of the likeliest tokens to show beside each chosen one, or None.
    """

    def __init__(
        self, id: str, model: str, tokenizer: Tokenizer, usage: Usage, choices: int,
        reader: Callable[[], Reader], *, chat: bool, logprobs: int | None, token_ids: bool,
    ) -> None:  # fmt: skip
        self.usage = usage
        self._tokenizer, self._chat = tokenizer, chat
        self._logprobs, self._token_ids = logprobs, token_ids
        self._choices = [_Choice(reader()) for _ in range(choices)]
        self._head = {
            "id": id,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def take(self, output: Output, at: int) -> list[dict[str, Any]]:
        """Reads an output of choice `at`; the chunks of a stream that it makes.

        Raises Failure for an output that is an error.
        """
        if output.finish_reason == "error":
            raise Failure(500, output.error or "the engine could not answer")
        if output.finish_reason == "timeout":
            raise Failure(408, "the request's timeout passed", code="timeout")
        choice = self._choices[at]
        choice.tokens += output.token_ids
        choice.finish, choice.stop_reason = output.finish_reason, output.stop_reason
        if output.prompt_logprobs is not None:
            choice.prompt_logprobs = output.prompt_logprobs
        self.usage.completion += len(output.token_ids)
        self.usage.cached = max(self.usage.cached, output.cached_tokens)
        shown = None
        if self._logprobs is not None and output.logprobs:
            show = self._chat_logprobs if self._chat else self._text_logprobs
            shown = show(choice, output.token_ids, output.logprobs)
            choice.logprobs += output.logprobs
        deltas = choice.reader.push(output.text)
        if choice.finish is not None:
            deltas += choice.reader.finish()
        pieces = [self._piece(choice, delta) for delta in deltas]
        pieces = self._dressed(choice, pieces, shown, output.token_ids)
        made = [self._chunk(at, piece) for piece in pieces]
        if choice.finish is not None:
            made[-1]["choices"][0] |= self._end(choice)
        return made

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that begin a chat's choices."""
        piece = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(i, piece) for i in range(len(self._choices))] if self._chat else []

    def echo(self, text: str, at: int) -> dict[str, Any]:
        """The prompt's `text` as the beginning of a completion's choice `at`."""
        self._choices[at].text = text
        return self._chunk(at, {"text": text})

    def chunk_of_usage(self) -> dict[str, Any]:
        """The last chunk of a stream that includes the usage."""
        return {**self._chunk_head(), "choices": [], "usage": self.usage.body()}

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._whole(at, choice) for at, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self.usage.body()}

    def _chunk_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind}

    def _chunk(self, at: int, piece: dict[str, Any]) -> dict[str, Any]:
        part = {"index": at, **piece, "finish_reason": None}
        part.setdefault("logprobs", None)
        return {**self._chunk_head(), "choices": [part]}

    def _piece(self, choice: _Choice, delta: Delta) -> dict[str, Any]:
        """Folds `delta` into the choice, and says it in OpenAI's words."""
        if delta.kind == "reasoning":
            choice.reasoning += delta.text
            return {"delta": {"reasoning_content": delta.text}}
        if delta.kind == "content":
            choice.text += delta.text
            return {"delta": {"content": delta.text}} if self._chat else {"text": delta.text}
        if delta.kind == "name":
            function = {"name": delta.text, "arguments": ""}
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
            choice.calls.append({**call, "function": dict(function)})
            return {"delta": {"tool_calls": [{"index": delta.index, **call, "function": function}]}}
        choice.calls[delta.index]["function"]["arguments"] += delta.text
        said = {"index": delta.index, "function": {"arguments": delta.text}}
        return {"delta": {"tool_calls": [said]}}

    def _dressed(
        self, choice: _Choice, pieces: list[dict[str, Any]], shown: Any, ids: Iterable[int]
    ) -> list[dict[str, Any]]:
        """`pieces` with what goes with them; an empty one where they are needed but there is none.

        Tokens and their log-probabilities go with the first piece that is sent after they came.
        """
        if not pieces and (shown or choice.finish is not None or (self._token_ids and ids)):
            pieces = [{"delta": {}} if self._chat else {"text": ""}]
        if pieces and shown:
            pieces[0]["logprobs"] = shown
        if pieces and self._token_ids:
            pieces[0]["token_ids"] = list(ids)
        return pieces

    def _end(self, choice: _Choice) -> dict[str, Any]:
        finish = "tool_calls" if choice.calls and choice.finish == "stop" else choice.finish
        return {"finish_reason": finish, "stop_reason": choice.stop_reason}

    def _whole(self, at: int, choice: _Choice) -> dict[str, Any]:
        made: dict[str, Any] = {"index": at}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": choice.text}
            if choice.reasoning:
                message["reasoning_content"] = choice.reasoning
            if choice.calls:
                message["tool_calls"] = choice.calls
                message["content"] = choice.text or None
            made["message"] = message
        else:
            made["text"] = choice.text
        choice.offset = 0
        show = self._chat_logprobs if self._chat else self._text_logprobs
        shown = None
        if self._logprobs is not None:
            shown = show(choice, choice.tokens, choice.logprobs)
        made |= {"logprobs": shown, **self._end(choice)}
        if self._token_ids:
            made["token_ids"] = choice.tokens
        if choice.prompt_logprobs is not None:
            made["prompt_logprobs"] = choice.prompt_logprobs
        return made

    def _token(self, id: int) -> str:
        return self._tokenizer.decode([id], skip_special=False)

    def _chat_logprobs(
        self, choice: _Choice, ids: Iterable[int], logprobs: Iterable[dict[int, float]]
    ) -> dict[str, Any]:
        def one(id: int, value: float) -> dict[str, Any]:
            return {"token": self._token(id), "logprob": max(value, -9999.0),
                    "bytes": self._bytes(id)}  # fmt: skip

        content = [
            {**one(id, among[id]), "top_logprobs": [one(*pair) for pair in self._top(among)]}
            for id, among in zip(ids, logprobs, strict=True)
        ]
        return {"content": content}

    def _text_logprobs(
        self, choice: _Choice, ids: Iterable[int], logprobs: Iterable[dict[int, float]]
    ) -> dict[str, Any]:
        made: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for id, among in zip(ids, logprobs, strict=True):
            token = self._token(id)
            made["tokens"].append(token)
            made["token_logprobs"].append(max(among[id], -9999.0))
            top = {self._token(other): max(value, -9999.0) for other, value in self._top(among)}
            made["top_logprobs"].append(top)
            made["text_offset"].append(choice.offset)
            choice.offset += len(token)
        return made

    def _top(self, among: dict[int, float]) -> list[tuple[int, float]]:
        return sorted(among.items(), key=lambda pair: (-pair[1], pair[0]))[: self._logprobs]

    def _bytes(self, id: int) -> list[int]:
        """A token's bytes, also where they are only part of a character."""
        piece = self._tokenizer.backend.id_to_token(id) or ""
        text = self._token(id)
        if "\ufffd" in text and all(character in _BYTES for character in piece):
            return [_BYTES[character] for character in piece]
        return list(text.encode())
