"""What a journal tells: where the time went, what it cost.

All of it is computed from events when it is asked for; `agent.state.fold` gives the conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from agent import events as ev
from agent import genai_names as names


@dataclass(frozen=True)
class Span:
    """A stretch of time, in seconds since 1970, that the event number `seq` ended; its attributes
    have the names of `agent.genai_names`."""

    kind: Literal["run", "model", "tool", "approval"]
    name: str
    start: float
    end: float
    seq: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)


def spans(events: Sequence[ev.Recorded]) -> list[Span]:
    """The runs, the model's turns, the tools and the waits for a person, by their beginnings. What
    never ended (a crash) ends with the journal and says so."""
    made: list[Span] = []
    open_spans: dict[tuple[str, str], Span] = {}
    agent = ""

    def close(kind: str, id: str, last: ev.Recorded, told: dict[str, Any]) -> None:
        begun = open_spans.pop((kind, id), None)
        if begun is not None:
            known = begun.attributes | told
            made.append(replace(begun, end=last.time, seq=last.seq, attributes=known))

    for recorded in events:
        at, event = recorded.time, recorded.event
        match event:
            case ev.RunStarted():
                agent = event.agent
                open_spans["run", ""] = Span("run", agent, at, at, 0, {names.AGENT: agent})
            case ev.HandedOff():
                agent = event.agent
            case ev.ModelResponded():
                usage = event.usage
                known = {
                    names.AGENT: agent, names.REQUEST_MODEL: event.model,
                    names.INPUT_TOKENS: usage.input, names.OUTPUT_TOKENS: usage.output,
                    names.CACHED_TOKENS: usage.cached, names.COST: usage.cost,
                    names.FINISH_REASONS: [event.finish],
                }  # fmt: skip
                made.append(Span("model", event.model, at - event.seconds, at, recorded.seq, known))
            case ev.ToolStarted():
                known = {names.AGENT: agent, names.TOOL: event.name, names.TOOL_TYPE: "function",
                         names.TOOL_CALL: event.call_id}  # fmt: skip
                open_spans["tool", event.call_id] = Span("tool", event.name, at, at, 0, known)
            case ev.ToolFinished():
                error = {names.ERROR: event.error} if event.error else {}
                close("tool", event.call_id, recorded, {names.TAINTED: event.tainted, **error})
                if made and made[-1].seq == recorded.seq:  # a pure call's beginning is kept late
                    made[-1] = replace(made[-1], start=recorded.time - event.seconds)
            case ev.ApprovalRequested():
                known = {names.AGENT: agent, names.TOOL: event.call.name}
                span = Span("approval", event.call.name, at, at, 0, known)
                open_spans["approval", event.call.id] = span
            case ev.ApprovalDecided():
                close("approval", event.call_id, recorded, {names.APPROVED: event.approved})
            case ev.RunFinished():
                bad = event.reason in ("error", "guardrail")
                error = {names.ERROR: event.reason} if bad else {}
                close("run", "", recorded, {names.END: event.reason, **error})
    for kind, id in list(open_spans):
        close(kind, id, events[-1], {names.ERROR: "unfinished"})
    return sorted(made, key=lambda span: span.start)


@dataclass(frozen=True)
class Cost:
    """What an agent's turns with a model used, or its calls of a tool. Tokens and `cost` are the
    model's; `seconds` are time in which it worked."""

    agent: str
    name: str
    times: int = 0
    input: int = 0
    output: int = 0
    cached: int = 0
    cost: float = 0.0
    seconds: float = 0.0


def costs(events: Sequence[ev.Recorded]) -> list[Cost]:
    """One line an agent and model, and an agent and tool. A fork counts only what it did itself,
    so that the sum over all sessions is what was spent."""
    first = max((r.seq for r in events if isinstance(r.event, ev.Forked)), default=0)
    lines: dict[tuple[str, str], Cost] = {}
    for span in spans(events):
        if span.kind not in ("model", "tool") or span.seq <= first:
            continue
        told = span.attributes
        key = (told[names.AGENT], span.name)
        line = lines.get(key, Cost(*key))
        lines[key] = replace(
            line, times=line.times + 1, seconds=line.seconds + span.end - span.start,
            input=line.input + told.get(names.INPUT_TOKENS, 0),
            output=line.output + told.get(names.OUTPUT_TOKENS, 0),
            cached=line.cached + told.get(names.CACHED_TOKENS, 0),
            cost=line.cost + told.get(names.COST, 0.0),
        )  # fmt: skip
    return list(lines.values())
