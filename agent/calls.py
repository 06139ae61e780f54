"""The calls of one turn: which run, in what order, side by side, and what the others are told."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from agent import events as ev
from agent.execute import PARALLEL, execute
from agent.gather import gather
from agent.messages import ToolCall
from agent.policy import Decision, decide, tripped
from agent.spec import Agent, transfer_name
from agent.tools import ArgumentError, Context, Tool

if TYPE_CHECKING:
    from agent.drive import Drive


async def call_tools(drive: Drive) -> bool:
    """Runs the calls of a turn that may run; False when all that is left waits for a person."""
    agent = drive.agent
    tools = {tool.name: tool for tool in agent.tools}
    ready: list[tuple[Tool, ToolCall]] = []
    for call in drive.state.pending:
        tool = tools.get(call.name)
        if tool is None:
            await _transfer_or_refuse(drive, agent, call)
            if drive.state.agent != agent.name:
                return True
            continue
        refused, waits = await _judge(drive, agent, tool, call, len(ready))
        if refused:
            kind, told = refused
            await drive.record(ev.ToolFinished(call.id, f"error: {told}", kind))
        elif not waits:
            ready.append((tool, call))
    if not ready:
        return not drive.state.pending
    for batch in _batches(ready):
        await gather((partial(_call, drive, tool, call) for tool, call in batch), PARALLEL)
    return True


async def _judge(
    drive: Drive, agent: Agent, tool: Tool, call: ToolCall, ahead: int
) -> tuple[tuple[str, str] | None, bool]:
    """The kind of error and what the model is told, where the call may not run; whether it waits
    for a person."""
    state = drive.state
    if call.id in state.started and call.id not in drive.mine and tool.effects == "write":
        told = "a crash interrupted this call; it may or may not have taken effect, and is not "
        return ("in_doubt", told + "run again"), False
    bound = drive.root.limits.tool_calls
    begun = call.id in state.started
    if bound is not None and not begun and state.spent.tool_calls + ahead >= bound:
        return ("limit", f"limit: {bound} tool calls used; answer with what you have"), False
    try:
        arguments = tool.parse(call.arguments)
    except ArgumentError:
        return None, False  # `execute` tells it; nothing runs
    if reason := await tripped(agent.guardrails, "call", f"{call.name} {call.arguments}"):
        return ("guardrail", f"stopped by the guardrail {reason}"), False
    try:
        decision = decide(agent.policy, tool, arguments, state.tainted_by)
    except Exception as error:
        decision = Decision("deny", f"the approval rule failed ({type(error).__name__})")
    if decision.action == "deny":
        return ("denied", f"denied: {decision.reason}"), False
    answer = state.decided.get(call.id)
    if decision.action == "allow" or (answer is not None and answer.approved):
        return None, False
    if answer is not None:
        return ("refused", f"a person refused this call. {answer.note}".strip()), False
    if call.id not in state.asked:
        await drive.record(ev.ApprovalRequested(call, decision.reason))
    return None, True


async def _transfer_or_refuse(drive: Drive, agent: Agent, call: ToolCall) -> None:
    other = next((a for a in agent.handoffs if transfer_name(a) == call.name), None)
    if other is None:
        names = ", ".join(spec.name for spec in agent.specs) or "none"
        told = f"error: there is no tool {call.name!r}; there are: {names}"
        await drive.record(ev.ToolFinished(call.id, told, "unknown_tool"))
        return
    rest = [c for c in drive.state.pending if c.id != call.id]
    skipped = [ev.ToolFinished(c.id, "error: not run beside a handoff", "skipped") for c in rest]
    handed = ev.HandedOff(other.name, drive.instructions(other))
    await drive.record(*skipped, ev.ToolFinished(call.id, f"{other.name} takes over"), handed)


async def _call(drive: Drive, tool: Tool, call: ToolCall) -> None:
    key = drive.state.started.get(call.id) or f"{drive.session}:{call.id}"
    drive.mine.add(call.id)
    started = ev.ToolStarted(call.id, call.name, key)
    # What is pure may run again after a crash, so its beginning need not be flushed before it.
    pure = tool.effects == "pure"
    await (drive.emit(started) if pure else drive.record(started))

    async def listen(event: ev.Kept | ev.Passing) -> None:
        await (drive.record(event) if isinstance(event, ev.Retried) else drive.show(event))

    async def report(text: str) -> None:
        await listen(ev.ToolProgress(call.id, text))

    ended = await drive.early.take(call, listen)
    if ended is None:
        context = Context(drive.deps, drive.session, drive.agent.name, call.id, key,
                          drive.state.tainted_by, report)  # fmt: skip
        ended = await execute(tool, call, context, listen)
    ended = replace(ended, call_id=call.id)
    if reason := await tripped(drive.agent.guardrails, "result", ended.content):
        held = f"error: the result is withheld by the guardrail {reason}"
        ended = replace(ended, content=held, error="guardrail")
    await (drive.record(started, ended, shown=1) if pure else drive.record(ended))


def _batches(ready: list[tuple[Tool, ToolCall]]) -> list[list[tuple[Tool, ToolCall]]]:
    """Runs of calls that may overlap; a serial tool, and one that writes, is alone."""
    batches: list[list[tuple[Tool, ToolCall]]] = [[]]
    for tool, call in ready:
        if tool.serial or tool.effects == "write":
            batches += [[(tool, call)], []]
        else:
            batches[-1].append((tool, call))
    return [batch for batch in batches if batch]
