"""When a run is over: the final answer, checked against its type and the output guardrails."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from agent.events import Kept, OutputRejected, RunFinished, ToolFinished
from agent.messages import ToolCall
from agent.policy import tripped
from agent.spec import FINAL
from agent.tools import faults

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
        adapter = TypeAdapter(agent.output_type)
        try:
            value = adapter.validate_json(text)
        except ValidationError as error:
            wrong = f"The answer does not fit its schema: {faults(error)}"
            await _reject(drive, OutputRejected(wrong))
        else:
            await _finish(drive, text, adapter.dump_python(value, mode="json"))


async def conclude_by_call(drive: Drive, call: ToolCall) -> None:
    """The model called the tool of the final answer; calls beside it do not run."""
    adapter = TypeAdapter(drive.agent.output_type)
    others = [c for c in drive.state.pending if c.id != call.id]
    skipped = [ToolFinished(c.id, "error: not run beside the answer", "skipped") for c in others]
    try:
        answer = json.loads(call.arguments)["answer"]
        value = adapter.validate_json(json.dumps(answer))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        wrong = faults(error) if isinstance(error, ValidationError) else "no valid 'answer'"
        told = ToolFinished(call.id, f"error: the answer does not fit: {wrong}", "arguments")
        await _reject(drive, *skipped, told, OutputRejected(wrong, call.id))
    else:
        accepted = ToolFinished(call.id, "accepted")
        output = adapter.dump_python(value, mode="json")
        await _finish(drive, call.arguments, output, *skipped, accepted)


async def _reject(drive: Drive, *events: Kept) -> None:
    """Sends the answer back, or ends the run when that was done often enough."""
    *before, rejected = events
    assert isinstance(rejected, OutputRejected)
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
