"""A model whose engine runs in this process: turns are tokens, and nothing is encoded twice.

    with EngineModel.load("smollm2-135m") as model:
        result = await run(Agent("clerk", model, "Be brief.", tools=(double,)), "Twice 21?")

A session's next prompt begins with the very ids of its last turn, so the prefix cache has all of
its full pages; while tools run, a lease keeps them, or host memory does, and what the template puts
before a result is computed already. `fork` goes on from one turn several times over
the same pages. A call, forced or begun by the model itself, is held to its tool's schema by the
grammar, whatever the weights; a forced turn is one call. What a session used, and which token was
computed again and why, is in its `Account`.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agent import engine_sessions
from agent.engine_sessions import CacheMiss, Session, Sessions, Turn
from agent.engine_thread import EngineThread, Used
from agent.messages import Message
from agent.model import Completion, Delta, Parts, Price, ReasoningDelta, Request, TransportError
from agent.returns import Returns
from decode.request import Output, QueueFull, SamplingParams
from decode.request import Request as EngineRequest
from decode.server.tools import Delta as Piece
from jaxinfra.errors import UserError

if TYPE_CHECKING:
    from decode.config import EngineConfig
    from decode.engine import Engine
    from jaxinfra.text import Tokenizer


@dataclass
class Account(Used):
    """What a session used so far; `miss` is of its last turn.

    Tokens: `prompt` ones, of which `cached` were not computed; `completion` ones; `recomputed` ones
    stood in full pages that an earlier turn had filled; `ahead` ones were computed before the turn
    that read them was asked.
    """

    turns: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    recomputed: int = 0
    ahead: int = 0
    miss: CacheMiss | None = None


class EngineModel:
    """A Model over `engine`, which from now on belongs to a thread of this model's.

    While a turn's tools run its pages are leased until they usually return: those wanted last go
    first where others need pages. lease: seconds after which that ends; leased: the share of all
    pages that it may take; host: pages in host memory for what does not fit, as a share of all.
    `salt` may be set at any time: prefixes are shared only under one salt. `total` is what all
    sessions used together, `host` what is kept in host memory.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, name: str = "engine", *, lease: float = 60.0,
        leased: float = 0.5, host: float = 1.0, price: Price | None = None,
    ) -> None:  # fmt: skip
        self.name, self.salt = name, ""
        self._price, self._returns = price or Price(), Returns()
        self._max_len, self._page = engine.config.max_len, engine.config.page_size
        self._sessions = Sessions(tokenizer)
        self._accounts: dict[str, Account] = {}
        self._thread = EngineThread(engine, leased, lease, host)
        self.total, self.host = self._thread.total, self._thread.host

    @classmethod
    def load(
        cls, name: str, config: EngineConfig | None = None, *, offline: bool = False, **options: Any
    ) -> EngineModel:
        """A model by name, as `jaxinfra.load` takes it; `options` as above. Raises UserError."""
        from decode.config import EngineConfig
        from decode.engine import Engine
        from jaxinfra.text import Tokenizer
        from jaxinfra.weights.pull import pull

        path = pull(name, offline=offline)
        config = config or EngineConfig(policy="least-attained")
        engine = Engine.load(str(path), config, offline=offline)
        return cls(engine, Tokenizer.from_path(path), name, **options)

    def __enter__(self) -> EngineModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._thread.close()

    @property
    def leases(self) -> int:
        """Sessions whose pages are being kept for them."""
        return len(self._thread.held)

    def account(self, session: str) -> Account:
        """What a session used; turns outside any session are all under ""."""
        return self._accounts.setdefault(session, Account())

    def tokens(self, session: str) -> tuple[int, ...]:
        """The ids of a session up to the end of its last turn. Raises UserError."""
        known = self._sessions.known.get(session)
        if known is None:
            raise UserError(
                f"agent: no session {session!r} in this engine; take a turn of it first"
            )
        return known.tokens

    def fork(self, session: str, new: str) -> None:
        """Makes `new` a session that goes on from where `session` stands, over its own pages.

        A lease keeps those until `session` is released or asked again. One that has taken no turn
        holds nothing yet, and neither will `new`.
        """
        known = self._sessions.known.get(session)
        if known is not None:
            self._sessions.put(new, known)
            self._thread.order(self._thread.hold, session, known.tokens, 0.0, known.salt)

    def release(self, session: str) -> None:
        """The session will not be asked again; what it used stays in its account."""
        self._sessions.known.pop(session, None)
        self._returns.forget(session)
        self._thread.order(self._thread.release, session)

    async def stream(self, request: Request) -> AsyncIterator[Delta | Completion]:
        self._returns.comes(request.session)
        turn = self._sessions.turn(request, self._max_len)
        params = replace(turn.ask.params, max_tokens=self._room(turn, request.settings.max_tokens))
        asked = replace(
            turn.ask, prompt=turn.tokens, params=params, program=request.program,
            cache_salt=self.salt,
        )  # fmt: skip
        heard = asyncio.Queue[Output | Exception]()
        account = self.account(request.session)
        self._thread.submit(asked, account, request.session or asked.id, heard.put_nowait)
        reader, parts, drawn, over = turn.reader(), Parts(), [], False
        try:
            while True:
                end = await heard.get()
                if isinstance(end, Exception):
                    raise _told(end)
                drawn += end.token_ids
                over = end.finish_reason is not None
                for piece in reader.push(end.text) + (reader.finish() if over else []):
                    yield _delta(parts, piece)
                if over:
                    break
        finally:
            if not over:
                self._thread.order(self._thread.abort, asked.id)
        if end.finish_reason not in ("stop", "length"):
            raise UserError(f"{self.name}: {end.error or end.finish_reason}")
        message = parts.message(tuple(drawn))
        self._ended(request, turn, asked.cache_salt, message, end, account)
        usage = self._price.usage(end.prompt_tokens, end.completion_tokens, end.cached_tokens)
        cut = end.finish_reason == "length"
        yield Completion(message, usage, "length" if cut else "calls" if message.calls else "stop")

    def _read(self, request: Request, tokens: tuple[int, ...], seconds: float) -> None:
        """Computes the tokens, as they are wanted in some seconds, and draws nothing."""
        account = self.account(request.session)

        def heard(told: Output | Exception) -> None:
            if isinstance(told, Output):
                account.ahead += told.prompt_tokens - told.cached_tokens

        params = SamplingParams(max_tokens=1, temperature=0.0)
        asked = EngineRequest(uuid.uuid4().hex, tokens, params, program=request.program,
                              cache_salt=self.salt)  # fmt: skip
        self._thread.submit(asked, account, request.session, heard, seconds)

    def _room(self, turn: Turn, wanted: int | None) -> int:
        room = self._max_len - len(turn.tokens)
        if room < 1:
            raise UserError(
                f"{self.name}: the conversation's {len(turn.tokens)} tokens leave no room in a "
                f"context of {self._max_len}; give the agent a Compression, or a longer max_len"
            )
        return room if wanted is None else min(wanted, room)

    def _ended(
        self, request: Request, turn: Turn, salt: str, message: Message, end: Output,
        account: Account,
    ) -> None:  # fmt: skip
        account.turns += 1
        account.prompt += end.prompt_tokens
        account.cached += end.cached_tokens
        account.completion += end.completion_tokens
        tools, said = tuple(request.tools), tuple(request.messages)
        before, account.miss = self._sessions.known.get(request.session), None
        if before is not None:
            now = Session(said, turn.tokens, tools, salt)
            lost, account.miss = engine_sessions.miss(before, now, end.cached_tokens, self._page)
            account.recomputed += lost
        if request.session:
            tokens = turn.tokens + (message.tokens or ())
            known = Session((*said, message), tokens, tools, salt)
            self._sessions.put(request.session, known)
            if message.calls:
                self._wait_for_tools(request, known)

    def _wait_for_tools(self, request: Request, known: Session) -> None:
        """Keeps what the session has until its tools return, and reads on as far as is known."""
        calls, tokens, thread = known.messages[-1].calls, known.tokens, self._thread
        expected = self._returns.leaves(request.session, (call.name for call in calls))
        thread.order(thread.hold, request.session, tokens, expected, known.salt)
        with contextlib.suppress(UserError):  # of the template: the next turn tells it
            ahead = tokens + self._sessions.ahead(request, known, self._max_len)
            if len(ahead) // self._page > len(tokens) // self._page:  # else no page is gained
                self._read(request, ahead, expected)


def _delta(parts: Parts, piece: Piece) -> Delta:
    match piece.kind:
        case "content":
            return parts.text(piece.text)
        case "reasoning":
            return ReasoningDelta(piece.text)
        case "name":
            return parts.call(piece.index, name=piece.text)
        case "arguments":
            return parts.call(piece.index, arguments=piece.text)


def _told(error: Exception) -> Exception:
    if isinstance(error, QueueFull):
        return TransportError(str(error))
    return error if isinstance(error, UserError) else UserError(str(error))
