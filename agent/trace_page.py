"""A run as one page of HTML that needs nothing else: when what ran, what was said, what it cost.

    jaxinfra agent trace SESSION

Everything that a model or a tool wrote is shown as text: the page runs no script.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

from agent import events as ev
from agent.journal import Store
from agent.projections import Cost, Span, costs, spans
from jaxinfra.errors import UserError

_COLOURS = {"run": "#d0d7de", "model": "#4c78a8", "tool": "#59a14f", "approval": "#edc948"}
_CSS = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border-bottom:1px solid #d0d7de;
text-align:right}td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f8fa;padding:.6em;margin:.3em 0}
details{margin:.3em 0}summary{cursor:pointer}.bad{color:#b42318}.tainted{color:#9a6700}
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
        bad = (
            told.get("error") or told.get("unfinished") or told.get("reason") in ("error", "limit")
        )
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
    event, at = recorded.event, f"{recorded.seq}."
    match event:
        case ev.RunStarted():
            asked = "".join(_text(f"{m.role}", m.content) for m in event.messages)
            told = _text("system", event.instructions)
            return f"<h3>{at} {_e(event.agent)} begins</h3>{told}{asked}"
        case ev.ModelResponded():
            u = event.usage
            calls = "".join(_text(f"calls {c.name}", c.arguments) for c in event.message.calls)
            told = f"{u.input} read, {u.cached} of them cached, {u.output} written"
            return (
                f"<p>{at} <b>{_e(event.model)}</b> in {event.seconds:.3f} s: {told}; "
                f"{_e(event.finish)}</p>{_text('says', event.message.content)}{calls}"
            )
        case ev.ToolFinished():
            kind = f"<b class=bad>{_e(event.error)}</b>" if event.error else "result"
            taint = " <span class=tainted>a stranger may have written this</span>"
            return f"<p>{at} {kind}{taint if event.tainted else ''}</p>{_text('', event.content)}"
        case ev.ApprovalRequested():
            return f"<p>{at} a person is asked about {_e(event.call.name)}: {_e(event.reason)}</p>"
        case ev.ApprovalDecided():
            return f"<p>{at} {'approved' if event.approved else 'refused'} {_e(event.note)}</p>"
        case ev.HandedOff():
            return f"<p>{at} handed to <b>{_e(event.agent)}</b></p>"
        case ev.Compressed():
            return (
                f"<p>{at} compressed by {_e(', '.join(event.strategies))}: {event.before} to "
                f"{event.after} tokens, {event.prefix} unchanged; lost: {_e(event.lost)}</p>"
            )
        case ev.Retried():
            return f"<p class=bad>{at} {event.layer} failed: {_e(event.error)}</p>"
        case ev.OutputRejected():
            return f"<p class=bad>{at} the answer was sent back: {_e(event.feedback)}</p>"
        case ev.RunFinished():
            said = "" if event.output is None else _text("answer", str(event.output))
            return f"<p>{at} ended: <b>{event.reason}</b> {_e(event.detail)}</p>{said}"
        case _:
            return f"<p>{at} {_e(event.type)}</p>"


def _text(label: str, text: str) -> str:
    if not text:
        return ""
    shown = f"<pre>{_e(text)}</pre>"
    if len(text) <= 400:
        return f"{_e(label)}{shown}"
    return f"<details><summary>{_e(label)} {len(text):,} characters</summary>{shown}</details>"
