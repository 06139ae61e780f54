"""What a run does next, by the fold of its journal (`agent.state`); see `agent.loop`."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import anyio
import anyio.abc

from agent import events as ev
from agent.answers import conclude, conclude_by_call
from agent.calls import call_tools
from agent.compress import compress
from agent.early import Early
from agent.gather import unwrapped
from agent.journal import MemoryStore, Store
from agent.messages import Message, user
from agent.model import Completion, Model, Request, TransportError, Usage
from agent.policy import tripped
from agent.redact import Redactor
from agent.retry import attempts
from agent.spec import FINAL, Agent, reachable
from agent.state import State, evolve, fold
from agent.tools import ignore
from jaxinfra.errors import UserError


@dataclass(frozen=True)
class Result:
    """How a run stands. `reason` is "waiting" while a person is asked; the session can then be
    resumed with their decisions, by this process or another."""

    session: str
    reason: ev.Reason | Literal["waiting"]
    output: Any
    detail: str
    state: State

    @property
    def approvals(self) -> tuple[ev.ApprovalRequested, ...]:
        return self.state.waiting


class Drive:
    """One process's hold on one session, from its first event to where the run stops."""

    def __init__(
        self, agent: Agent, store: Store | None, session: str | None, deps: Any,
        redactor: Redactor | None, emit: Callable[[ev.Event], Awaitable[None]] = ignore,
    ):  # fmt: skip
        self.agents = reachable(agent)
        self.root = agent
        self.store = store or MemoryStore()
        self.session = session or uuid.uuid4().hex
        self.deps = deps
        self.redactor = redactor or Redactor()
        self.emit = emit
        self.state = State()
        self.mine: set[str] = set()  # calls that this process began
        self.partial: list[str] = []  # text of the turn that is under way
        self.lock = anyio.Lock(fast_acquire=True)
        self.early = Early(self)
        self.group: anyio.abc.TaskGroup  # of what outlasts a step

    @property
    def agent(self) -> Agent:
        agent = self.agents.get(self.state.agent)
        if agent is None:
            raise UserError(
                f"session {self.session} is with the agent {self.state.agent!r}, which "
                f"{self.root.name!r} neither is nor hands over to; give the agent it began with"
            )
        return agent

    async def begin(self, task: str | Sequence[Message], tainted_by: tuple[str, ...]) -> Result:
        self.state = fold(await self.store.read(self.session))
        if self.state.runs and self.state.finished is None:
            raise UserError(f"session {self.session} has an unfinished run; resume it first")
        agent = self.agent if self.state.runs else self.root
        messages = (user(task),) if isinstance(task, str) else tuple(task)
        said = "\n".join(m.content for m in messages if m.role == "user")
        began = ev.RunStarted(agent.name, self.instructions(agent), messages, tainted_by)
        if reason := await tripped(agent.guardrails, "input", said):
            # What a guardrail stopped is not kept in the conversation, only that it did.
            stopped = ev.RunFinished("guardrail", detail=reason)
            return await self._go(replace(began, messages=()), stopped)
        return await self._go(began)

    async def go_on(self, decisions: Mapping[str, bool | str]) -> Result:
        self.state = fold(await self.store.read(self.session))
        if not self.state.runs:
            raise UserError(f"there is no session {self.session} to resume")
        waiting = {request.call.id for request in self.state.waiting}
        if unknown := sorted(set(decisions) - waiting):
            raise UserError(f"session {self.session}: no call {unknown[0]!r} waits for approval")
        _ = self.agent
        if self.state.finished is not None and self.state.finished.reason == "done":
            return self._result()
        decided = [
            ev.ApprovalDecided(id, answer is True, answer if isinstance(answer, str) else "")
            for id, answer in decisions.items()
        ]
        return await self._go(*decided, ev.Resumed())

    def instructions(self, agent: Agent) -> str:
        given = agent.instructions
        return given if isinstance(given, str) else given(self.deps)

    async def record(self, *events: ev.Kept, shown: int = 0) -> None:
        """Journals the events, all or none, then folds and emits them but for the first `shown`."""
        cleaned = [self.redactor.event(event) for event in events]
        async with self.lock:
            with anyio.CancelScope(shield=True):  # the fold must not miss what was committed
                kept = await self.store.append(self.session, self.state.seq, cleaned)
                for recorded in kept:
                    self.state = evolve(self.state, recorded)
        for event in cleaned[shown:]:
            await self.emit(event)

    async def listen(self, event: ev.Retried | ev.ToolProgress) -> None:
        """What a running tool tells; its progress, which is not kept, may hold secrets too."""
        if isinstance(event, ev.Retried):
            await self.record(event)
        else:
            await self.emit(replace(event, text=self.redactor.text(event.text)))

    async def _go(self, *first: ev.Kept) -> Result:
        seconds = self.root.limits.seconds
        try:
            await self.record(*first)
            left = None if seconds is None else max(0.0, seconds - self.state.spent.seconds)
            with unwrapped(), anyio.move_on_after(left) as clock:
                async with anyio.create_task_group() as self.group:
                    while self.state.finished is None and await self._step():
                        pass
                    self.group.cancel_scope.cancel()  # what began early and nobody took
            if clock.cancelled_caught:
                await self._close("limit", f"seconds: {seconds:g} used")
        except anyio.get_cancelled_exc_class():
            self.emit = ignore  # whoever listened has gone
            with anyio.CancelScope(shield=True):
                await self._close("cancelled", "")
            raise
        return self._result()

    async def _step(self) -> bool:
        """Does what the state calls for; False when only a person can go on."""
        state = self.state
        last = state.messages[-1] if state.messages else None
        structured = self.agent.schema is not None
        final = next((c for c in state.pending if structured and c.name == FINAL), None)
        if final is not None:
            await conclude_by_call(self, final)
        elif state.pending:
            return await call_tools(self)
        elif last is not None and last.role == "assistant" and not last.calls and state.finish:
            await conclude(self, last.content)
        elif reached := self.root.limits.reached(state.spent):
            await self.record(ev.RunFinished("limit", detail=reached))
        else:
            try:
                await self._turn()
            except (TransportError, UserError) as error:
                await self.record(
                    ev.RunFinished("error", detail=f"{self.agent.model.name}: {error}")
                )
        return True

    async def _close(self, reason: ev.Reason, detail: str) -> None:
        """Ends the run with a conversation in which every call has a result."""
        if self.state.finished is not None or not self.state.runs:
            return
        text = "".join(self.partial)
        events: list[ev.Kept] = []
        if text:
            message = Message("assistant", text)
            events.append(ev.ModelResponded(self.agent.model.name, message, Usage(), "cut", 0.0))
        for call in self.state.pending:
            began = call.id in self.state.started
            so = "it was ended and may have taken effect" if began else "it had no effect"
            events.append(ev.ToolFinished(call.id, f"error: {reason}: {so}", reason))
        await self.record(*events, ev.RunFinished(reason, text or None, detail))

    async def _turn(self) -> None:
        agent = self.agent
        if agent.compression is not None:
            made = await compress(self.state.messages, agent.compression, agent.model)
            if made is not None:
                await self.record(made)
        state = self.state
        settings = replace(
            agent.settings,
            max_tokens=self.root.limits.tokens_left(state.spent, agent.settings.max_tokens),
        )
        specs = agent.specs
        by_call = bool(specs) and agent.schema is not None  # then the answer itself is a call
        request = Request(
            state.prompt, specs, "required" if by_call else "auto", settings,
            None if specs else agent.schema, self.session,
        )  # fmt: skip

        async def tell(number: int, error: Exception) -> None:
            await self.record(ev.Retried("transport", number, str(error)))

        end = await attempts(
            lambda: self._listen(agent.model, request), _wait, agent.transport_retries, tell
        )
        self.partial.clear()
        await self.record(replace(end, message=_with_unique_ids(end.message, state)))

    async def _listen(self, model: Model, request: Request) -> ev.ModelResponded:
        began = time.monotonic()
        self.partial.clear()
        self.early.forget()
        stream: Any = model.stream(request)
        async with contextlib.aclosing(stream):
            async for item in stream:
                if isinstance(item, Completion):
                    return ev.ModelResponded(
                        model.name, item.message, item.usage, item.finish, time.monotonic() - began
                    )
                if isinstance(item, ev.TextDelta):
                    self.partial.append(item.text)
                elif isinstance(item, ev.CallDelta):
                    await self.early.hear(item)
                await self.emit(item)
        raise TransportError(f"{model.name}: the stream ended without an end")

    def _result(self) -> Result:
        finished = self.state.finished
        if finished is None:
            return Result(self.session, "waiting", None, "", self.state)
        output = finished.output
        if finished.reason == "done" and self.agent.schema is not None:
            output = self.agent.output.validate_json(json.dumps(output))
        return Result(self.session, finished.reason, output, finished.detail, self.state)


def _wait(error: Exception) -> bool | float:
    if not isinstance(error, TransportError):
        return False
    return True if error.after is None else error.after


def _with_unique_ids(message: Message, state: State) -> Message:
    """Servers leave ids out, and repeat them turn after turn; the journal needs them unique."""
    seen = {call.id for m in state.messages for call in m.calls}
    calls = []
    for i, call in enumerate(message.calls):
        if not call.id or call.id in seen:
            call = replace(call, id=f"call_{state.seq + 1}_{i}")
        seen.add(call.id)
        calls.append(call)
    return replace(message, calls=tuple(calls))
