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
        decision = await judge(drive, tool, call, len(ready))
        if decision.action == "allow":
            ready.append((tool, call))
        elif decision.action == "deny":
            told = f"error: {decision.kind}: {decision.reason}"
            await drive.record(ev.ToolFinished(call.id, told, decision.kind))
        elif call.id not in drive.state.asked:
            await drive.record(ev.ApprovalRequested(call, decision.reason))
    if not ready:
        return not drive.state.pending
    for batch in _batches(ready):
        await gather((partial(_call, drive, tool, call) for tool, call in batch), PARALLEL)
    return True


async def judge(drive: Drive, tool: Tool, call: ToolCall, ahead: int) -> Decision:
    """What becomes of a call before which `ahead` others of its turn will run."""
    agent, state = drive.agent, drive.state
    begun = call.id in state.started
    if begun and call.id not in drive.mine and tool.effects == "write":
        told = "a crash interrupted this call; it may or may not have taken effect, and is not "
        return Decision("deny", told + "run again", "in_doubt")
    bound = drive.root.limits.tool_calls
    if bound is not None and not begun and state.spent.tool_calls + ahead >= bound:
        return Decision("deny", f"{bound} tool calls used; answer with what you have", "limit")
    try:
        arguments = tool.parse(call.arguments)
    except ArgumentError:
        return Decision("allow")  # `execute` tells it; nothing runs
    if reason := await tripped(agent.guardrails, "call", f"{call.name} {call.arguments}"):
        return Decision("deny", f"stopped by {reason}", "guardrail")
    try:
        decision = decide(agent.policy, tool, arguments, state.tainted_by)
    except Exception as error:
        return Decision("deny", f"the approval rule failed ({type(error).__name__})")
    answer = state.decided.get(call.id)
    if answer is None or decision.action != "ask":
        return decision
    refused = Decision("deny", f"a person refused this call. {answer.note}".strip(), "refused")
    return Decision("allow") if answer.approved else refused


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

    async def report(text: str) -> None:
        await drive.listen(ev.ToolProgress(call.id, text))

    ended = await drive.early.take(call, drive.listen)
    if ended is None:
        context = Context(drive.deps, drive.session, drive.agent.name, call.id, key,
                          drive.state.tainted_by, report)  # fmt: skip
        ended = await execute(tool, call, context, drive.listen)
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
