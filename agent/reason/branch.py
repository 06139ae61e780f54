"""A line of thought that can be forked, and the budget that all forks share.

    root = Branch(model, (user(task),))
    for child in await root.fork(3): await child.ask("Propose a next step.")

A fork holds the same messages. A model with sessions of its own (`fork` and `release`) is told, so
that it shares what it computed; any other serves the same prefix from its cache, if it has one.
"""

from __future__ import annotations

import itertools
import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from agent.messages import Message, user
from agent.model import Model, Request, Settings, Usage, complete


@runtime_checkable
class Forking(Protocol):
    """What a model with sessions can do besides taking turns."""

    def fork(self, session: str, new: str) -> None:
        """Makes `new` a session with all that `session` holds, copying nothing."""
        ...

    def release(self, session: str) -> None:
        """The session will not be asked again."""
        ...


class Exhausted(Exception):
    """The budget is used up; searches end with the best they have."""


@dataclass
class Budget:
    """What a whole search may use; None is no bound. `usage` and `calls` count as it goes."""

    calls: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    usage: Usage = field(default_factory=Usage)
    used_calls: int = 0
    began: float = field(default_factory=time.monotonic)

    def take(self) -> None:
        """Before a call; raises Exhausted."""
        tokens, seconds = self.usage.input + self.usage.output, time.monotonic() - self.began
        bounds = (self.calls, self.used_calls), (self.tokens, tokens), (self.seconds, seconds)
        if any(bound is not None and used >= bound for bound, used in bounds):
            raise Exhausted
        self.used_calls += 1


@dataclass
class Branch:
    """A conversation with a model that can go several ways."""

    model: Model
    messages: tuple[Message, ...]
    budget: Budget = field(default_factory=Budget)
    settings: Settings = field(default_factory=Settings)
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    _forks: itertools.count = field(default_factory=itertools.count, repr=False)

    @property
    def text(self) -> str:
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")

    async def fork(self, n: int) -> list[Branch]:
        """`n` branches that go on from here."""
        made = []
        for _ in range(n):
            name = f"{self.session}/{next(self._forks)}"
            if isinstance(self.model, Forking):
                self.model.fork(self.session, name)
            made.append(Branch(self.model, self.messages, self.budget, self.settings, name))
        return made

    async def ask(self, text: str, settings: Settings | None = None) -> str:
        """Says `text`, and returns and keeps the answer."""
        self.budget.take()
        asked = (*self.messages, user(text))
        request = Request(asked, settings=settings or self.settings, session=self.session)
        end = await complete(self.model, request)
        self.budget.usage = self.budget.usage + end.usage
        self.messages = (*asked, end.message)
        return end.message.content

    async def aside(self, text: str, settings: Settings | None = None) -> str:
        """The answer to `text`, which this branch does not keep."""
        (fork,) = await self.fork(1)
        try:
            return await fork.ask(text, settings)
        finally:
            await fork.close()

    async def close(self) -> None:
        if isinstance(self.model, Forking):
            self.model.release(self.session)
