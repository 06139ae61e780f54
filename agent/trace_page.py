"""A run as one page of HTML that needs nothing else: when what ran, what was said, what it cost.

    jaxinfra agent trace SESSION

Everything that a model or a tool wrote is shown as text: the page runs no script.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from agent import events as ev
from agent import genai_names as names
from agent.journal import Store
from agent.projections import Cost, Span, costs, spans
from jaxinfra.errors import UserError

_COLOURS = {"run": "#d0d7de", "model": "#4c78a8", "tool": "#59a14f", "approval": "#edc948"}
_CSS = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border-bottom:1px solid #d0d7de;
text-align:right}td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:.6em;margin:.3em 0}
details{margin:.3em 0}summary{cursor:pointer}.bad{color:#b42318}
svg{width:100%;height:auto;font:11px system-ui,sans-serif}
"""


async def family(store: Store, session: str) -> dict[str, list[ev.Recorded]]:
    """The session, those that it began (their names continue its own, or hold a key of one of its
    calls) and the forks of any of them."""
    names = [info.session for info in await store.sessions()]
    if session not in names:
        close = [name for name in names if session in name][:5]
        raise UserError(f"no session {session!r} in the journal" + (f"; {close}?" if close else ""))
    found = {session: await store.read(session)}
    rest = {name: await store.read(name) for name in names if name != session}
    while True:
        more = {
            name: events for name, events in rest.items()
            if name not in found and (
                any(name.startswith((f"{known}/", f"{known}:")) for known in found)
                or any(isinstance(r.event, ev.Forked) and r.event.parent in found for r in events)
            )
        }  # fmt: skip
        if not more:
            return found
        found |= more


def page(session: str, sessions: Mapping[str, Sequence[ev.Recorded]]) -> str:
    """The HTML of a session and those of its family, the session itself first."""
    lines = [(name, one) for name, events in sessions.items() for one in spans(events)]
    body = [f"<h1>{_e(session)}</h1>", _timeline(lines), "<h2>Cost</h2>", _costs(sessions)]
    for name, events in sessions.items():
        body += [f"<h2>{_e(name)}</h2>", *(_entry(recorded) for recorded in events)]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_e(session)}</title>"
        f"<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        f"style-src 'unsafe-inline'\"><style>{_CSS}</style><body>{''.join(body)}</body></html>"
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _timeline(lines: Sequence[tuple[str, Span]]) -> str:
    if not lines:
        return "<p>Nothing has run.</p>"
    first = min(span.start for _, span in lines)
    whole = max(max(span.end for _, span in lines) - first, 1e-6)
    drawn = []
    for i, (session, span) in enumerate(lines):
        x, y = 240 + 700 * (span.start - first) / whole, 4 + 18 * i
        width = max(1.5, 700 * (span.end - span.start) / whole)
        told = span.attributes
        bad = names.ERROR in told or told.get(names.END) == "limit"
        shown = f"{span.kind} {span.name}"
        title = f"{session}: {shown}, {span.end - span.start:.3f} s, {json.dumps(told)}"
        drawn.append(
            f"<g><title>{_e(title)}</title>"
            f"<text x=0 y={y + 11} fill={'#b42318' if bad else '#1f2328'}>{_e(shown[:38])}</text>"
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="13" '
            f'fill="{"#e15759" if bad else _COLOURS[span.kind]}"/></g>'
        )
    height = 18 * len(lines) + 24
    axis = f'<text x="240" y="{height - 4}">0 to {whole:.3f} s</text>'
    return f'<svg viewBox="0 0 960 {height}" role="img">{"".join(drawn)}{axis}</svg>'


def _costs(sessions: Mapping[str, Sequence[ev.Recorded]]) -> str:
    numbers = [f.name for f in fields(Cost) if f.name not in ("agent", "name")]
    head = "".join(f"<th>{name}</th>" for name in ("branch", "agent", "model or tool", *numbers))
    rows, total = [], dict.fromkeys(numbers, 0.0)
    for branch, events in sessions.items():
        for line in costs(events):
            values = [getattr(line, name) for name in numbers]
            total = {n: total[n] + v for n, v in zip(numbers, values, strict=True)}
            cells = "".join(f"<td>{value:.6g}</td>" for value in values)
            rows.append(f"<tr><td>{_e(branch)}<td>{_e(line.agent)}<td>{_e(line.name)}{cells}")
    cells = "".join(f"<th>{value:.6g}</th>" for value in total.values())
    return f"<table><tr>{head}{''.join(rows)}<tr><th>all<th><th>{cells}</table>"


def _entry(recorded: ev.Recorded) -> str:
    event = recorded.event
    bad = isinstance(event, ev.OutputRejected) or bool(getattr(event, "error", None))
    line, *texts = _told(event)
    shown = "".join(_text(label, text) for label, text in texts)
    return f"<p{' class=bad' * bad}>{recorded.seq}. {_e(line)}</p>{shown}"


def _told(event: ev.Kept) -> tuple[Any, ...]:
    """A line about the event, then what was said in it as (label, text)."""
    match event:
        case ev.RunStarted():
            asked = ((m.role, m.content) for m in event.messages)
            return f"{event.agent} begins", ("system", event.instructions), *asked
        case ev.ModelResponded():
            u, calls = event.usage, ((f"calls {c.name}", c.arguments) for c in event.message.calls)
            line = (
                f"{event.model} in {event.seconds:.3f} s: {u.input} read, {u.cached} of them "
                f"cached, {u.output} written; {event.finish}"
            )
            return line, ("says", event.message.content), *calls
        case ev.ToolFinished():
            taint = ", a stranger may have written this" if event.tainted else ""
            return f"{event.error or 'result'}{taint}", ("", event.content)
        case ev.ApprovalRequested():
            return (f"a person is asked about {event.call.name}: {event.reason}",)
        case ev.ApprovalDecided():
            return (f"{'approved' if event.approved else 'refused'} {event.note}",)
        case ev.HandedOff():
            return (f"handed to {event.agent}",)
        case ev.Compressed():
            names, size = ", ".join(event.strategies), f"{event.before} to {event.after} tokens"
            return (f"compressed by {names}: {size}, {event.prefix} unchanged; lost: {event.lost}",)
        case ev.Retried():
            return (f"{event.layer} failed: {event.error}",)
        case ev.OutputRejected():
            return (f"the answer was sent back: {event.feedback}",)
        case ev.RunFinished():
            said = "" if event.output is None else str(event.output)
            return f"ended: {event.reason} {event.detail}", ("answer", said)
    return (event.type,)


def _text(label: str, text: str) -> str:
    if not text:
        return ""
    shown = f"<pre>{_e(text)}</pre>"
    if len(text) <= 400:
        return f"{_e(label)}{shown}"
    return f"<details><summary>{_e(label)} {len(text):,} characters</summary>{shown}</details>"
