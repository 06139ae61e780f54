"""Calls that begin before their turn has ended: as soon as the model has closed their arguments.

Only what nobody misses if it had never run begins early: a pure tool that policy and guardrails
allow and that asks for no context, where all calls before it have begun. The turn's end decides: a
call that it holds takes what was begun for it; what nobody took (the turn broke off, or says
something else) is ended before the next turn. Nothing is journalled before the turn is, and no
progress is told before the call has ended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import anyio

from agent.calls import judge
from agent.events import Retried, ToolFinished, ToolProgress
from agent.execute import PARALLEL, Tell, execute
from agent.messages import ToolCall
from agent.model import CallDelta
from agent.tools import Context, Tool

if TYPE_CHECKING:
    from agent.drive import Drive


@dataclass
class _Begun:
    """A call under way; what it says waits until it is known to be wanted."""

    call: ToolCall
    said: list[Retried | ToolProgress] = field(default_factory=list)
    ended: ToolFinished | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)


class Early:
    """What has begun in the turn that is being written."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self._written: dict[int, str] = {}
        self._begun: list[_Begun] = []  # the turn's first calls, in order

    def forget(self) -> None:
        """Another turn is written: ends what nobody took."""
        for begun in self._begun:
            begun.scope.cancel()
        self._written, self._begun = {}, []

    async def hear(self, delta: CallDelta) -> None:
        """A piece of a call's arguments; begins the call if that closed them."""
        text = self._written.get(delta.index, "") + delta.arguments
        self._written[delta.index] = text
        if delta.index != len(self._begun) or not delta.arguments.rstrip().endswith("}"):
            return  # begun already, behind one that has not begun, or not closed now
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return
        drive = self._drive
        call = ToolCall("", delta.name, text)  # the turn's end names it
        tool = next((tool for tool in drive.agent.tools if tool.name == call.name), None)
        if tool is not None and await self._may(tool, call):
            self._begun.append(begun := _Begun(call))
            drive.group.start_soon(self._run, tool, begun)

    async def _may(self, tool: Tool, call: ToolCall) -> bool:
        if tool.effects != "pure" or tool.serial or tool.context:
            return False
        if sum(not begun.done.is_set() for begun in self._begun) >= PARALLEL:
            return False
        return (await judge(self._drive, tool, call, len(self._begun))).action == "allow"

    async def _run(self, tool: Tool, begun: _Begun) -> None:
        async def say(event: Retried | ToolProgress) -> None:
            begun.said.append(event)

        with begun.scope:
            begun.ended = await execute(tool, begun.call, Context(), say)
        begun.done.set()

    async def take(self, call: ToolCall, listen: Tell) -> ToolFinished | None:
        """The end of the call, if it was begun; `listen` is told what it said."""
        wanted = call.name, call.arguments.strip()  # white space may come behind what closed them
        same = (b for b in self._begun if (b.call.name, b.call.arguments.strip()) == wanted)
        begun = next(same, None)
        if begun is None:
            return None
        self._begun.remove(begun)
        await begun.done.wait()
        for event in begun.said:
            mine = isinstance(event, ToolProgress)
            await listen(replace(event, call_id=call.id) if mine else event)
        return begun.ended
