"""The tour's report: one HTML file that needs no other, figures inside it as SVG."""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jaxinfra.files import write_file

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: left }
td.number { text-align: right } caption { text-align: left; font-weight: 600; padding: .25rem 0 }
figure { margin: 1rem 0; background: white; color: black; padding: .5rem; border-radius: .5rem }
figure svg { max-width: 100%; height: auto } figcaption { font-size: .9rem; padding: .25rem }
pre { background: var(--soft); padding: 1rem; border-radius: .5rem; white-space: pre-wrap }
.note { border-left: .25rem solid #d80; padding-left: 1rem } .conditions { font-size: .85rem }
"""


@dataclasses.dataclass
class Section:
    """One stage's part of the report; its methods add to it in order."""

    title: str
    parts: list[str] = dataclasses.field(default_factory=list)

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """A paragraph that stands out: something was left out, or did not go well."""
        self.parts.append(f'<p class="note">{html.escape(text)}</p>')

    def verbatim(self, text: str) -> None:
        """Text as it was printed."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; numbers are set to the right."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        self.parts.append(
            f"<table><caption>{html.escape(caption)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def figure(self, caption: str, figure: Figure) -> None:
        """A matplotlib figure, as SVG in the page."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        self.parts.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")


@dataclasses.dataclass
class Report:
    """Sections in the order of the stack, and the conditions under which they were made."""

    title: str
    conditions: Mapping[str, object]
    sections: list[Section] = dataclasses.field(default_factory=list)

    def section(self, title: str) -> Section:
        """A new section at the end."""
        self.sections.append(Section(title))
        return self.sections[-1]

    def write(self, path: Path) -> None:
        """Writes the page, whole or not at all."""
        body = "".join(
            f"<section><h2>{html.escape(s.title)}</h2>{''.join(s.parts)}</section>"
            for s in self.sections
        )
        rows = "".join(
            f"<tr><th>{html.escape(str(name))}</th>{_cell(value)}</tr>"
            for name, value in self.conditions.items()
        )
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
            f'<body><h1>{title}</h1>{body}<section class="conditions"><h2>Conditions of every '
            f"figure above</h2><table>{rows}</table></section></body></html>\n"
        )
        write_file(path, page.encode())


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{html.escape(str(value))}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return f'<td class="number">{shown}</td>'
