"""The loop: a model takes turns, its calls run, until an answer, a limit or a person to ask.

    result = await run(Agent("clerk", model, tools=(search,)), "Who wrote it?", store=store)

Each step is decided by the fold of the session's journal, which has what a step did before the next
one begins. So `run`, `resume` after a crash and going on after an approval are the same function. A
call that may have an effect is journalled before it runs: a process that finds it begun and not
ended runs it again only if its tool says that this is harmless. A pure one is journalled when it
has ended; it may run before its turn has (`agent.early`), and again after a crash.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import anyio

from agent.drive import Drive, Result
from agent.events import Event
from agent.gather import unwrapped
from agent.journal import Store
from agent.messages import Message
from agent.redact import Redactor
from agent.spec import Agent


class Stream:
    """The events of a run as they happen; `result` is there when they have ended."""

    def __init__(self, events: Any):
        self._events = events
        self.result: Result | None = None

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events.__aiter__()


async def run(
    agent: Agent, task: str | Sequence[Message], *, store: Store | None = None,
    session: str | None = None, deps: Any = None, redactor: Redactor | None = None,
    tainted_by: tuple[str, ...] = (),
) -> Result:  # fmt: skip
    """Runs the agent on a new task, in a new session or after what is in an old one."""
    drive = Drive(agent, store, session, deps, redactor)
    return await drive.begin(task, tainted_by)


async def resume(
    agent: Agent, session: str, *, store: Store, decisions: Mapping[str, bool | str] | None = None,
    deps: Any = None, redactor: Redactor | None = None,
) -> Result:  # fmt: skip
    """Goes on where the journal ends: after a crash, a limit, an error, or with a person's
    `decisions` by call id (True, False, or a refusal in words that the model is told)."""
    return await Drive(agent, store, session, deps, redactor).go_on(decisions or {})


async def run_once(
    agent: Agent, task: str | Sequence[Message], *, store: Store, session: str, deps: Any = None,
    tainted_by: tuple[str, ...] = (),
) -> Result:  # fmt: skip
    """The one run of a session: begun, gone on with, or already over and only looked up. What is
    made of such runs under names of their own can be started again after a crash and repeats
    nothing."""
    if not await store.read(session, until=1):
        return await run(
            agent, task, store=store, session=session, deps=deps, tainted_by=tainted_by
        )
    return await resume(agent, session, store=store, deps=deps)


@contextlib.asynccontextmanager
async def run_stream(
    agent: Agent, task: str | Sequence[Message] | None = None, *, store: Store | None = None,
    session: str | None = None, decisions: Mapping[str, bool | str] | None = None, deps: Any = None,
    redactor: Redactor | None = None,
) -> AsyncIterator[Stream]:  # fmt: skip
    """`run`, or without a task `resume`, as a stream of events; leaving the block early cancels
    the run.

        async with run_stream(agent, "What is 6 * 7?") as events:
            async for event in events: ...
    """
    send, receive = anyio.create_memory_object_stream[Event](64)
    stream = Stream(receive)
    drive = Drive(agent, store, session, deps, redactor, emit=send.send)

    async def work() -> None:
        async with send:
            if task is None:
                stream.result = await drive.go_on(decisions or {})
            else:
                stream.result = await drive.begin(task, ())

    with unwrapped():
        async with anyio.create_task_group() as group, receive:
            group.start_soon(work)
            yield stream
            if stream.result is None:
                group.cancel_scope.cancel()
