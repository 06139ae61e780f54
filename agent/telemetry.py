"""A session's journal as OpenTelemetry spans and metrics, by the GenAI conventions.

    export(await store.read(session), session)          # to the globally set provider

Spans are a projection of the journal: a run, its turns, its tools and its waits for people. They
are made when they are asked for, with the times of the journal, so a run costs nothing for being
traced and one that crashed can be traced too. What was said is left out unless `content` is set;
secrets are not in the journal, so they are in no span either way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agent import genai_names as names
from agent.events import ModelResponded, Recorded, RunStarted, ToolFinished
from agent.messages import to_openai
from agent.projections import spans

_OPERATION = {
    "run": names.INVOKE_AGENT, "model": names.CHAT, "tool": names.EXECUTE_TOOL,
    "approval": names.AWAIT_APPROVAL,
}  # fmt: skip


def export(
    events: Sequence[Recorded], session: str, *, content: bool = False, provider: str = "jaxinfra",
    tracer_provider: Any = None, meter_provider: Any = None,
) -> int:  # fmt: skip
    """Sends the session's spans and metrics to the given providers, or the global ones; returns how
    many spans. `provider` names who serves the model. Needs opentelemetry-api."""
    from opentelemetry import metrics, trace

    tracer = trace.get_tracer("jaxinfra.agent", tracer_provider=tracer_provider)
    meter = metrics.get_meter("jaxinfra.agent", meter_provider=meter_provider)
    duration = meter.create_histogram(*names.OPERATION_DURATION)
    usage = meter.create_histogram(*names.TOKEN_USAGE)
    found = sorted(spans(events), key=lambda span: span.kind != "run")
    said = _contents(events) if content else {}
    runs: list[tuple[float, Any]] = []
    for one in found:
        inside = [run for start, run in runs if start <= one.start and one.kind != "run"]
        context = trace.set_span_in_context(inside[-1]) if inside else None
        labels = {names.OPERATION: _OPERATION[one.kind], names.PROVIDER: provider}
        span = tracer.start_span(
            f"{_OPERATION[one.kind]} {one.name}", context=context, start_time=int(one.start * 1e9),
            attributes={**labels, names.CONVERSATION: session, **one.attributes,
                        **said.get(one.seq, {})},
            kind=trace.SpanKind.CLIENT if one.kind == "model" else trace.SpanKind.INTERNAL,
        )  # fmt: skip
        if error := one.attributes.get(names.ERROR):
            span.set_status(trace.StatusCode.ERROR, error)
        span.end(int(one.end * 1e9))
        if one.kind == "run":
            runs.append((one.start, span))
        if one.kind in ("model", "tool"):
            duration.record(one.end - one.start, labels)
        if one.kind == "model":
            model = {**labels, names.REQUEST_MODEL: one.name}
            for kind, name in (("input", names.INPUT_TOKENS), ("output", names.OUTPUT_TOKENS)):
                usage.record(one.attributes[name], {**model, names.TOKEN_TYPE: kind})
    return len(found)


def _contents(events: Sequence[Recorded]) -> dict[int, dict[str, str]]:
    """What was said, by the event that ended the span."""
    found: dict[int, dict[str, str]] = {}
    asked: list[dict[str, Any]] = []
    arguments: dict[str, str] = {}
    for recorded in events:
        match recorded.event:
            case RunStarted():
                asked += [to_openai(message) for message in recorded.event.messages]
            case ModelResponded():
                message = recorded.event.message
                found[recorded.seq] = {
                    names.INPUT_MESSAGES: json.dumps(asked),
                    names.OUTPUT_MESSAGES: json.dumps([to_openai(message)]),
                }
                asked = []
                arguments |= {call.id: call.arguments for call in message.calls}
            case ToolFinished():
                event = recorded.event
                found[recorded.seq] = {
                    names.TOOL_ARGUMENTS: arguments.get(event.call_id, ""),
                    names.TOOL_RESULT: event.content,
                }
                asked.append({"role": "tool", "content": event.content})
    return found
