"""Conversations as tokens: what an engine in this process was given and drew is encoded once.

A turn of the model is kept as the ids that it drew. What the template puts after it, the end of the
turn, the new messages and the beginning of the next, is the only text that is encoded, and follows
those ids. It is found by rendering the conversation as it is and with another text in place of that
turn: what stands behind the two must be the same. What a model thought aloud stays, as it was
drawn, also where its template would leave it out. Cost: four renderings a turn, seven where it ends
in calls.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from agent.messages import Message, same_start
from agent.model import Request, ToolSpec, openai_body
from decode.request import Request as EngineRequest
from decode.server.prompts import Sender, chat
from decode.server.protocol import ChatRequest, Failure
from decode.server.tools import Reader
from jaxinfra.errors import UserError
from jaxinfra.text import Tokenizer

Cause = Literal["evicted", "messages", "template", "salt"]


@dataclass(frozen=True)
class CacheMiss:
    """The first token, by its place in the prompt, that was computed again, and why.

    evicted: other sequences took its page. messages: the conversation before it was rewritten.
    template: it was offered other tools. salt: it was kept for somebody else.
    """

    token: int
    cause: Cause


@dataclass(frozen=True)
class Session:
    """A conversation up to its last turn: messages, their ids, and what they were cached under."""

    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    tools: tuple[ToolSpec, ...]
    salt: str


@dataclass(frozen=True)
class Turn:
    """A turn that is to be taken: its prompt's ids; how to sample and read it is in `ask`."""

    tokens: tuple[int, ...]
    ask: EngineRequest
    reader: Callable[[], Reader]


class Sessions:
    """The last `most` sessions, as tokens by one tokenizer and its template."""

    def __init__(self, tokenizer: Tokenizer, most: int = 1024) -> None:
        if tokenizer.chat_template is None:
            raise UserError("agent: the model has no chat template; choose one tuned for chats")
        self._tokenizer, self._most = tokenizer, most
        self.known: OrderedDict[str, Session] = OrderedDict()

    def put(self, session: str, known: Session) -> None:
        """Keeps it as the latest; the one used longest ago may go."""
        self.known[session] = known
        self.known.move_to_end(session)
        if len(self.known) > self._most:
            self.known.popitem(last=False)

    def turn(self, request: Request, max_len: int) -> Turn:
        """The turn that is asked, its prompt as the session's own tokens and what is new.

        A session that is not known, as after a crash, is put together from its messages' ids.
        Raises UserError for what the template or the model cannot take.
        """
        known = self.known.get(request.session)
        messages = tuple(request.messages)
        turns = [i for i, m in enumerate(messages) if i and m.tokens is not None]
        text, ask, reader = self._render(request, messages, max_len)
        if known is not None and _goes_on(known, request):
            tokens = [*known.tokens]
            turns = [i for i in turns if i >= len(known.messages) - 1]
        elif turns:
            tokens = self._encode(self._render(request, messages[: turns[0]], max_len)[0])
            tokens += messages[turns[0]].tokens or ()
        else:
            tokens = self._encode(text)
        for at, end in zip(turns, [*turns[1:], len(messages)], strict=False):
            tokens += self._new(tokens, self._after(request, messages[:end], at, max_len))
            if end < len(messages):
                tokens += messages[end].tokens or ()
        return Turn(tuple(tokens), ask, reader)

    def ahead(self, request: Request, known: Session, max_len: int) -> tuple[int, ...]:
        """What will stand between a last turn of calls and the first's result, as tokens that do
        not depend on the result."""
        mark = uuid.uuid4().hex
        messages = (*known.messages, Message("tool", mark, call_id=""))
        text = self._after(request, messages, len(known.messages) - 1, max_len).partition(mark)[0]
        # A result's first letters may become one token with what stands before them.
        one, other = (self._new(known.tokens, text + result) for result in ("0", "Z"))
        return tuple(one[: same_start(one, other)])

    def _new(self, before: Sequence[int], text: str) -> list[int]:
        """What `text` adds to the tokens before it: not the end of a turn that ended itself."""
        after = self._encode(text)
        twice = before[-1] in self._tokenizer.eos_ids and after[0] == before[-1]
        return after[1:] if twice else after

    def _after(self, request: Request, messages: tuple[Message, ...], at: int, max_len: int) -> str:
        """The text behind turn `at`, up to where the next is to be written."""
        mark = uuid.uuid4().hex
        other = (*messages[:at], Message("assistant", mark), *messages[at + 1 :])
        whole = self._render(request, messages, max_len)[0]
        after = self._render(request, other, max_len)[0].partition(mark)[2]
        before = self._render(request, messages[:at], max_len, False)[0] if at else ""
        if not after or not whole.endswith(after) or not whole.startswith(before):
            raise UserError(
                "chat template: what it writes before or after a turn depends on what comes later, "
                "so turns cannot be appended as tokens; mend the template, or use HTTPModel"
            )
        return after

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False)

    def _render(
        self, request: Request, messages: Sequence[Message], max_len: int, begin: bool = True
    ) -> tuple[str, EngineRequest, Callable[[], Reader]]:
        words = _Words(self._tokenizer)
        try:
            # Where calls are asked for, random weights would never stop.
            several = request.tool_choice in ("auto", "none")
            asked: Any = openai_body(request, messages) | {"parallel_tool_calls": several}
            asked.pop("max_tokens", None)  # `EngineModel` knows the room
            body = ChatRequest(**asked, add_generation_prompt=begin)
            ask = chat(body, cast(Tokenizer, words), max_len, Sender(uuid.uuid4().hex, "", 0.0))
        except (Failure, ValueError) as error:
            raise UserError(f"agent: {' '.join(str(error).split())}") from None
        return words.text, ask.requests[0], ask.reader


class _Words:
    """What `prompts.chat` takes for a tokenizer, so as to give its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.chat_template, self.special = tokenizer.chat_template, tokenizer.special
        self.vocab_size, self.text = tokenizer.vocab_size, ""

    def encode(self, text: str, add_special: bool) -> list[int]:
        self.text = text
        return [0]


def miss(before: Session, now: Session, cached: int, page: int) -> tuple[int, CacheMiss | None]:
    """(tokens in full pages that were computed again, the report on the first of them).

    before, now: the session after its last turn and with this one's prompt. cached: tokens of the
    prompt that the engine found. The last token of a turn was never computed, so is no miss.
    """
    same = same_start(before.tokens, now.tokens)
    computed = min(len(before.tokens), len(now.tokens)) - 1
    lost = max(0, min(computed, same) // page * page - cached)
    if before.salt != now.salt:
        return lost, CacheMiss(cached, "salt")
    if same < computed:
        return lost, CacheMiss(same, "template" if before.tools != now.tools else "messages")
    return lost, CacheMiss(cached, "evicted") if lost else None


def _goes_on(known: Session, request: Request) -> bool:
    count = len(known.messages)
    return (
        known.tools == tuple(request.tools)
        and len(request.messages) >= count
        and all(map(_same, known.messages, request.messages))
    )


def _same(mine: Message, theirs: Message) -> bool:
    """Whether it is one message; the loop names calls that the model left without a name."""
    return mine == theirs or (mine.tokens is not None and mine.tokens == theirs.tokens)
