"""The calls of one turn: which run, in what order, side by side, and what the others are told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from agent import events as ev
from agent.execute import PARALLEL, Emit, execute
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
        answer, error, may_run = await _judge(drive, agent, tool, call, len(ready))
        if may_run:
            ready.append((tool, call))
        elif answer is not None:
            await drive.record(ev.ToolFinished(call.id, f"error: {answer}", error))
    if not ready:
        return not drive.state.pending
    for batch in _batches(ready):
        if len(batch) == 1:
            await _call(drive, *batch[0])
            continue
        async with anyio.create_task_group() as group:
            limiter = anyio.CapacityLimiter(PARALLEL)
            for tool, call in batch:
                group.start_soon(_limited, limiter, drive, tool, call)
    return True


async def _judge(
    drive: Drive, agent: Agent, tool: Tool, call: ToolCall, ahead: int
) -> tuple[str | None, str, bool]:
    """What the model is told instead of a run, the kind of error, whether the call may run."""
    state = drive.state
    if call.id in state.started and call.id not in drive.mine and tool.effects == "write":
        return (
            "a crash interrupted this call; it may or may not have taken effect, and is not "
            "run again", "in_doubt", False,
        )  # fmt: skip
    bound = drive.root.limits.tool_calls
    begun = call.id in state.started
    if bound is not None and not begun and state.spent.tool_calls + ahead >= bound:
        return f"limit: {bound} tool calls used; answer with what you have", "limit", False
    try:
        arguments = tool.parse(call.arguments)
    except ArgumentError:
        return None, "", True  # to be told by `execute`; nothing runs
    if reason := await tripped(agent.guardrails, "call", f"{call.name} {call.arguments}"):
        return f"stopped by the guardrail {reason}", "guardrail", False
    try:
        decision = decide(agent.policy, tool, arguments, state.tainted_by)
    except Exception as error:
        decision = Decision("deny", f"the approval rule failed ({type(error).__name__})")
    if decision.action == "allow":
        return None, "", True
    if decision.action == "deny":
        return f"denied: {decision.reason}", "denied", False
    answer = state.decided.get(call.id)
    if answer is None:
        if call.id not in state.asked:
            await drive.record(ev.ApprovalRequested(call, decision.reason))
        return None, "", False
    if answer.approved:
        return None, "", True
    return f"a person refused this call. {answer.note}".strip(), "refused", False


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


async def _limited(limiter: anyio.CapacityLimiter, *what: Any) -> None:
    async with limiter:
        await _call(*what)


async def _call(drive: Drive, tool: Tool, call: ToolCall) -> None:
    key = drive.state.started.get(call.id) or f"{drive.session}:{call.id}"
    drive.mine.add(call.id)
    started = ev.ToolStarted(call.id, call.name, key)
    # What is pure may run again after a crash, so its beginning need not be flushed before it.
    pure = tool.effects == "pure"
    await (drive.emit(started) if pure else drive.record(started))

    async def listen(event: ev.Kept | ev.Passing) -> None:
        await (drive.record(event) if isinstance(event, ev.Retried) else drive.show(event))

    ended = await drive.early.take(call, listen)
    if ended is None:
        ended = await execute(tool, call, _context(drive, call, key, listen), listen)
    ended = replace(ended, call_id=call.id)
    if reason := await tripped(drive.agent.guardrails, "result", ended.content):
        held = f"error: the result is withheld by the guardrail {reason}"
        ended = replace(ended, content=held, error="guardrail")
    await (drive.record(started, ended, shown=1) if pure else drive.record(ended))


def _context(drive: Drive, call: ToolCall, key: str, say: Emit) -> Context:
    """What the tool is told about where its call comes from."""

    async def report(text: str) -> None:
        await say(ev.ToolProgress(call.id, text))

    return Context(
        drive.deps, drive.session, drive.agent.name, call.id, key, drive.state.tainted_by, report
    )


def _batches(ready: list[tuple[Tool, ToolCall]]) -> list[list[tuple[Tool, ToolCall]]]:
    """Runs of calls that may overlap; a serial tool, and one that writes, is alone."""
    batches: list[list[tuple[Tool, ToolCall]]] = [[]]
    for tool, call in ready:
        if tool.serial or tool.effects == "write":
            batches += [[(tool, call)], []]
        else:
            batches[-1].append((tool, call))
    return [batch for batch in batches if batch]
