"""The command `jaxinfra agent`. Importing this imports no jax: each command does when it runs."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxinfra.errors import UserError

_JOURNAL = "agent.sqlite"


@dataclass(frozen=True)
class Which:
    """The model, and how long it may go on."""

    url: str | None = None
    """An OpenAI-compatible server's address, ending in /v1."""
    model: str = "smollm2-135m"
    """The model's name on that server; engine:NAME runs one in this process, without a server."""
    react: bool = False
    """For models that know no tool calls: tools by text."""
    turns: int = 20
    """The most turns of the model a run may take."""


@dataclass(frozen=True)
class Who(Which):
    """The model, its tools, and where everything is kept."""

    tools: tuple[Literal["python", "shell", "memory"], ...] = ("python",)
    """What it may use; python and shell run in a sandbox."""
    mcp: tuple[str, ...] = ()
    """MCP servers whose tools it may use: addresses, or commands to start."""
    instructions: str = "You are a careful assistant. Use a tool where it knows better than you."
    """What it is told first."""
    journal: str = _JOURNAL
    """The SQLite file that holds all sessions, or the URL of a PostgreSQL database."""
    memory: Path = Path("agent-memory")
    """The folder of the memory tool."""


@dataclass(frozen=True)
class Run:
    """Does one task, and prints the answer."""

    task: Positional[str]
    who: Annotated[Who, arg(name="")] = Who()
    session: str | None = None
    """Goes on in this session."""

    def __call__(self) -> None:
        from agent.terminal import converse

        converse(self.who, self.session, [self.task])


@dataclass(frozen=True)
class Chat:
    """Talks in the terminal; Ctrl-C stops an answer, Ctrl-D ends."""

    who: Annotated[Who, arg(name="")] = Who()
    session: str | None = None
    """Goes on in this session; what waits for your approval is asked first."""

    def __call__(self) -> None:
        from agent.terminal import converse

        converse(self.who, self.session, None)


@dataclass(frozen=True)
class Eval:
    """Tries tasks, and prints success, pass^k, faults and cost by kind."""

    who: Annotated[Which, arg(name="")] = Which()
    suite: Literal["own", "bfcl", "gym"] = "own"
    """Our seeded suite, BFCL v4 from its wheel, or reasoning-gym's datasets."""
    names: tuple[str, ...] = ()
    """Of own, all by default: a arithmetic, b hops, c units, d state, e irrelevance, f flaky tools,
    g fan-out, h needle, i memory, j injections. Categories of bfcl, datasets of gym."""
    seeds: int = 5
    """Tasks of each kind, category or dataset."""
    repeats: int = 4
    """Tries of each task; pass^k is for k = repeats."""
    difficulty: int = 1
    """Of our own suite; 1 is easiest."""
    width: int = 4
    """Tries side by side."""
    out: Path | None = None
    """Also writes every try, as JSON, here."""

    def __call__(self) -> None:
        from agent.evaluate.command import evaluate_suite

        evaluate_suite(self)


@dataclass(frozen=True)
class Trace:
    """Writes a session as a page of HTML: timeline, conversation, cost."""

    session: Positional[str]
    journal: str = _JOURNAL
    """The SQLite file or the URL that holds the session."""
    out: Path = Path("trace.html")
    """Where to write it."""

    def __call__(self) -> None:
        import anyio

        from agent.sql_store import open_store
        from agent.trace_page import family, page
        from jaxinfra.files import write_file

        with contextlib.closing(open_store(self.journal, existing=True)) as store:
            found = anyio.run(family, store, self.session)
        write_file(self.out, page(self.session, found).encode())
        print(self.out)


@dataclass(frozen=True)
class Sessions:
    """Lists the sessions of a journal, the latest first."""

    journal: str = _JOURNAL
    """The SQLite file or the URL."""

    def __call__(self) -> None:
        from agent.terminal import list_sessions

        list_sessions(self.journal)


@dataclass(frozen=True)
class Serve:
    """Serves an agent over HTTP: streamed events, sessions, a key for each user."""

    who: Annotated[Who, arg(name="")] = Who()
    host: str = "127.0.0.1"
    """Beyond this machine only with keys."""
    port: int = 8100
    """0 picks one."""

    def __call__(self) -> None:
        pairs = os.environ.get("JAXINFRA_AGENT_KEYS", "").split(",")
        keys = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if self.host not in ("127.0.0.1", "::1", "localhost") and not keys:
            raise UserError(
                f"agent serve: {self.host} is open to others; set JAXINFRA_AGENT_KEYS=ada=KEY,..."
            )
        from agent.terminal import serve

        serve(self, keys)


def agent(
    command: Annotated[Run | Chat | Eval | Trace | Sessions | Serve, arg(name="")],
) -> None:
    """Runs agents with tools: run, chat, eval, trace, sessions, serve."""
    command()
