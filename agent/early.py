"""Calls that begin before their turn has ended: as soon as the model has closed their arguments.

Only what nobody misses if it had never run begins early: a pure tool that policy and guardrails
allow, behind no call that must run before it. The turn's end decides: a call that it holds takes
what was begun for it, anything else (the turn broke off, or says something else) is ended. Nothing
is journalled before the turn is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from agent.events import Kept, Passing, ToolFinished, ToolProgress
from agent.execute import Emit, execute
from agent.messages import ToolCall
from agent.model import CallDelta
from agent.policy import decide, tripped
from agent.tools import Context, Tool

if TYPE_CHECKING:
    from agent.drive import Drive


@dataclass
class _Begun:
    """A call under way; what it says waits until it is known to be wanted."""

    call: ToolCall
    said: list[Kept | Passing] = field(default_factory=list)
    ended: ToolFinished | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class Early:
    """What has begun in the turn that is being written."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self._written: dict[int, str] = {}
        self._begun: list[_Begun] = []
        self._barrier = False

    def forget(self) -> None:
        """Another turn is written: ends what nobody took."""
        for begun in self._begun:
            begun.scope.cancel()
        self._written, self._begun, self._barrier = {}, [], False

    async def hear(self, delta: CallDelta) -> None:
        """A piece of a call's arguments; begins the call if that closed them."""
        text = self._written.get(delta.index, "") + delta.arguments
        self._written[delta.index] = text
        if not text.rstrip().endswith("}") or self._barrier:
            return
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return
        drive = self._drive
        call = ToolCall(f"call_{drive.state.seq + 1}_{delta.index}", delta.name, text)
        tool = next((tool for tool in drive.agent.tools if tool.name == call.name), None)
        if tool is None or not await self._may(tool, call):
            self._barrier = True  # what comes behind it waits for it
            return
        self._begun.append(begun := _Begun(call))
        drive.group.start_soon(self._run, tool, begun)

    async def _may(self, tool: Tool, call: ToolCall) -> bool:
        drive = self._drive
        bound = drive.root.limits.tool_calls
        used = drive.state.spent.tool_calls + len(self._begun)
        if tool.effects != "pure" or tool.serial or (bound is not None and used >= bound):
            return False
        try:
            decision = decide(drive.agent.policy, tool, tool.parse(call.arguments),
                              drive.state.tainted_by)  # fmt: skip
        except Exception:  # `agent.calls` tells it
            return False
        asked = f"{call.name} {call.arguments}"
        return decision.action == "allow" and not await tripped(
            drive.agent.guardrails, "call", asked
        )

    async def _run(self, tool: Tool, begun: _Begun) -> None:
        async def say(event: Kept | Passing) -> None:
            begun.said.append(event)

        with begun.scope:
            context = context_of(self._drive, begun.call, "", say)
            begun.ended = await execute(tool, begun.call, context, say)
        begun.done.set()

    async def take(self, call: ToolCall, listen: Emit) -> ToolFinished | None:
        """The end of the call, if it was begun; `listen` is told what it said."""
        begun = next((b for b in self._begun if _same(b.call, call)), None)
        if begun is None:
            return None
        self._begun.remove(begun)
        await begun.done.wait()
        for event in begun.said:
            mine = isinstance(event, ToolProgress)
            await listen(ToolProgress(call.id, event.text) if mine else event)
        return begun.ended


def _same(begun: ToolCall, call: ToolCall) -> bool:
    return (begun.name, begun.arguments) == (call.name, call.arguments)


def context_of(drive: Drive, call: ToolCall, key: str, say: Emit) -> Context:
    """What the tool is told about where its call comes from."""

    async def report(text: str) -> None:
        await say(ToolProgress(call.id, text))

    return Context(
        drive.deps, drive.session, drive.agent.name, call.id, key, drive.state.tainted_by, report
    )
