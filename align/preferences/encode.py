"""Records to tokens: a prompt, and an answer with a mask of what is learnt of it.

Prompt and answer are tokenised apart, so that the prompt's tokens are those a generation starts
from; TRL tokenises both at once and cuts, which differs where a token would span the border. Text
gets the end-of-sequence token after the answer; messages get what the chat template writes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxinfra.errors import UserError
from jaxinfra.text import chat
from jaxinfra.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Tokens of a prompt (one or more), then of an answer, with 1 where one is learnt."""

    prompt: list[int]
    answer: list[int]
    mask: list[int]

    def cut(self, length: int) -> Sequence | None:
        """With at most `length` tokens: less of the answer; None where no learnt token is left."""
        room = length - len(self.prompt)
        if room < 1 or not any(self.mask[:room]):
            return None
        return Sequence(self.prompt, self.answer[:room], self.mask[:room])

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Makes Sequences of a record's fields; errors name the record's place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def answer(self, where: str, record: dict[str, Any], name: str) -> Sequence:
        """record["prompt"] and the answer record[name]: both text, or both messages.

        A prompt may be missing where the answer is a whole conversation: all but the last message
        is the prompt then.
        """
        answer = _field(where, record, name)
        prompt = record.get("prompt")
        if isinstance(answer, str):
            prompt = _field(where, record, "prompt")
            if not isinstance(prompt, str):
                raise UserError(f"{where}: prompt holds messages and {name} text; make them alike")
            return self._text(where, prompt, answer, name)
        if isinstance(prompt, list):
            return self._messages(where, [*prompt, *answer], len(prompt))
        if len(answer) < 2:
            raise UserError(f"{where}: {name} is one message and there are none before it")
        return self._messages(where, answer, len(answer) - 1)

    def supervised(self, where: str, record: dict[str, Any]) -> Sequence:
        """A record of sft, of any of its three kinds."""
        if "messages" in record:
            return self._messages(where, _field(where, record, "messages"), 0)
        if "text" in record:
            text = _field(where, record, "text")
            if not isinstance(text, str):
                raise UserError(f"{where}: text is a {type(text).__name__}")
            ids = self._encode(where, text, True) + self._end()
            if len(ids) < 2:
                raise UserError(f"{where}: text has one token, and nothing foretells it")
            return Sequence(ids[:1], ids[1:], [1] * (len(ids) - 1))
        if "completion" not in record:
            raise UserError(f"{where}: has none of messages, text, prompt with completion")
        return self.answer(where, record, "completion")

    def token(self, where: str, text: str) -> int:
        """The one token that `text` is; UserError where it is more."""
        ids = self._encode(where, text, False)
        if len(ids) != 1:
            raise UserError(f"{where}: belief {text!r} is {len(ids)} tokens; give one of one token")
        return ids[0]

    def _text(self, where: str, prompt: str, answer: str, name: str) -> Sequence:
        if not answer:
            raise UserError(f"{where}: {name} is empty; remove the record or give an answer")
        before = self._encode(where, prompt, True)
        before = before[:-1] if before[-1:] == self._end() else before  # tokenizers that add both
        if not before:
            raise UserError(f"{where}: prompt is empty, and this tokenizer begins texts with none")
        ids = self._encode(where, answer, False) + self._end()
        return Sequence(before, ids, [1] * len(ids))

    def _messages(self, where: str, messages: list, first: int) -> Sequence:
        """The assistant's messages from number `first` on are learnt, each to its turn's end."""
        prompt, answer, mask, done = [], [], [], ""
        for i, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            if role != "assistant" or i < first or i == 0:
                continue
            if not message.get("content") and not message.get("tool_calls"):
                raise UserError(f"{where}: message {i} is empty; remove it or give an answer")
            before = self._render(where, messages[:i], True)
            after = self._render(where, messages[: i + 1], False)
            whole = _shared(before, after)
            if not before.startswith(done) or len(whole) <= len(done):
                raise UserError(
                    f"{where}: the chat template changes earlier turns when later ones follow; "
                    "give prompt and completion of one turn"
                )
            between = self._encode(where, before[len(done) : len(whole)], False)
            learnt = self._encode(where, after[len(whole) :], False)
            if prompt:
                answer += between
                mask += [0] * len(between)
            else:
                prompt = between
            answer += learnt
            mask += [1] * len(learnt)
            done = after
        if not any(mask):
            raise UserError(f"{where}: holds no message of the assistant with something before it")
        return Sequence(prompt, answer, mask)

    def _render(self, where: str, messages: list, generation: bool) -> str:
        tokenizer = self._tokenizer
        special: dict[str, Any] = dict(tokenizer.special)
        if tokenizer.chat_template is None:
            raise UserError(
                f"{where}: holds messages, and the tokenizer has no chat template; give text, or "
                "--tokenizer of a chat model"
            )
        try:
            return chat.render(
                tokenizer.chat_template, messages, add_generation_prompt=generation,
                **special,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _encode(self, where: str, text: str, special: bool) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special=special)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _end(self) -> list[int]:
        return list(self._tokenizer.eos_ids[:1])


def _shared(a: str, b: str) -> str:
    """What two texts begin with."""
    size = min(len(a), len(b))
    return a[: next((i for i in range(size) if a[i] != b[i]), size)]


def _field(where: str, record: dict[str, Any], name: str) -> Any:
    """A field that is text or a list of messages."""
    value = record.get(name)
    if value is None:
        raise UserError(f"{where}: lacks the field {name}; it has {', '.join(record) or 'none'}")
    if not isinstance(value, str | list):
        raise UserError(f"{where}: {name} is a {type(value).__name__}; give text or messages")
    if isinstance(value, list) and not value:
        raise UserError(f"{where}: {name} is empty; remove the record or give an answer")
    return value
