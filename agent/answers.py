"""When a run is over: the final answer, checked against its type and the output guardrails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from agent.events import Kept, OutputRejected, RunFinished, ToolFinished
from agent.messages import ToolCall
from agent.policy import tripped
from agent.spec import FINAL
from agent.tools import ArgumentError, faults

if TYPE_CHECKING:
    from agent.drive import Drive


async def conclude(drive: Drive, text: str) -> None:
    """The model said `text` and called nothing."""
    agent, finish = drive.agent, drive.state.finish
    if finish in ("length", "cut"):
        reached = drive.root.limits.reached(drive.state.spent)
        if reached or agent.schema is not None:
            detail = reached or "the answer was cut at max_tokens"
            await drive.record(RunFinished("limit", text, detail))
            return
    if agent.schema is None:
        await _finish(drive, text, text)
    elif agent.specs:
        await _reject(drive, OutputRejected(f"Give your answer by calling the tool {FINAL}."))
    else:
        try:
            value = agent.output.validate_json(text)
        except ValidationError as error:
            wrong = f"The answer does not fit its schema: {faults(error)}"
            await _reject(drive, OutputRejected(wrong))
        else:
            await _finish(drive, text, agent.output.dump_python(value, mode="json"))


async def conclude_by_call(drive: Drive, call: ToolCall) -> None:
    """The model called the tool of the final answer; calls beside it do not run."""
    agent = drive.agent
    others = [c for c in drive.state.pending if c.id != call.id]
    skipped = [ToolFinished(c.id, "error: not run beside the answer", "skipped") for c in others]
    try:
        value = agent.final.parse(call.arguments)["answer"]
    except ArgumentError as error:
        told = ToolFinished(call.id, f"error: {error}", "arguments")
        await _reject(drive, OutputRejected(str(error), call.id), *skipped, told)
    else:
        accepted = ToolFinished(call.id, "accepted")
        output = agent.output.dump_python(value, mode="json")
        await _finish(drive, call.arguments, output, *skipped, accepted)


async def _reject(drive: Drive, rejected: OutputRejected, *before: Kept) -> None:
    """Sends the answer back, or ends the run when that was done often enough."""
    if drive.state.rejected >= drive.root.limits.output_retries:
        end = RunFinished("error", detail=f"no valid answer: {rejected.feedback}")
        await drive.record(*before, end)
    else:
        await drive.record(*before, rejected)


async def _finish(drive: Drive, text: str, output: Any, *before: Kept) -> None:
    if reason := await tripped(drive.agent.guardrails, "output", text):
        await drive.record(*before, RunFinished("guardrail", detail=reason))
    else:
        detail = "the answer was cut at max_tokens" if drive.state.finish == "length" else ""
        await drive.record(*before, RunFinished("done", output, detail))
