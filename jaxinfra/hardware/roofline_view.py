"""A roofline report as a table for the terminal and as a log-log plot, the same bytes each time."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from jaxinfra.errors import UserError
from jaxinfra.files import write_file
from jaxinfra.hardware.roofline import Phase, Roof, RooflineReport

_COLOURS = {"matmul": "#1f77b4", "attention": "#d62728", "elementwise": "#7f7f7f"}
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def quantity(value: float, unit: str) -> str:
    """A number with three digits and a decimal prefix: 989 TFLOP/s."""
    scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), (1, ""))
    return f"{value / scale:.3g} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Seconds with three digits in s, ms or µs."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def render_table(report: RooflineReport) -> Table:
    """One row an operation, a section a phase, with the bound on tokens/s that they add up to."""
    table = Table(
        title=f"{report.model} on {report.chip.name}, {report.dtype}, batch {report.batch}, "
              f"sequence {report.seq_len:,}",
        caption=_caption(report), caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("operation", no_wrap=True)
    for name in ("FLOPs", "bytes", "FLOPs/B", "time", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    if report.ceiling:
        table.add_column("time here", justify="right")
    for phase in report.phases:
        here = [] if phase.measured is None else ["", f"[bold]{duration(phase.measured)}[/]"]
        seconds = f"[bold]{duration(phase.seconds)}[/]"
        table.add_row(f"[bold]{phase.name}[/]", "", "", "", seconds, "", *here)
        for row in phase.rows:
            op = row.operation
            cells = [f" {op.name}", quantity(op.flops, ""), quantity(op.bytes, "B"),
                     f"{op.intensity:,.1f}", duration(row.seconds), f"{row.share:.1%}",
                     row.bound]  # fmt: skip
            table.add_row(*cells, *([] if row.measured is None else [duration(row.measured)]))
        table.add_section()
    return table


def plot(report: RooflineReport, path: str | Path) -> None:
    """Writes `figure(report)` as SVG or PNG, whichever `path` ends in."""
    path = Path(path)
    kind = path.suffix[1:].lower()
    if kind not in ("svg", "png"):
        raise UserError(f"{path}: a plot is written as .svg or .png; choose one of them")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "jaxinfra", "svg.fonttype": "none"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure(report).savefig(buffer, format=kind, dpi=150, metadata=metadata)
    write_file(path, buffer.getvalue())


def figure(report: RooflineReport) -> Figure:
    """One panel a phase: the roof, the ceilings measured here, and a dot an operation.

    A dot lies on the roof at its intensity; its area is its share of the phase's time.
    """
    fig = Figure(figsize=(5 * len(report.phases), 4.6), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(1, len(report.phases), sharex=True, sharey=True, squeeze=False)[0]
    intensities = [row.operation.intensity for phase in report.phases for row in phase.rows]
    ridge = report.roof.flops / report.roof.bandwidth
    low = min([i for i in intensities if i > 0] + [ridge / 30]) / 2
    high = max([*intensities, ridge * 10]) * 10
    for ax, phase in zip(axes, report.phases, strict=True):
        _draw_roof(ax, report.roof, low, high, "-")
        if report.ceiling:
            _draw_roof(ax, report.ceiling, low, high, "--")
        _draw_operations(ax, phase, report.roof)
        ax.set(xscale="log", yscale="log", xlabel="FLOPs a byte")
        ax.set_title(f"{phase.name}: at most {phase.tokens_per_second:,.0f} tokens/s")
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(loc="lower right", fontsize=8)
    axes[0].set_ylabel("FLOP/s")
    fig.suptitle(
        f"{report.model}, {report.dtype}, batch {report.batch}, sequence {report.seq_len:,}"
    )
    return fig


def _draw_roof(ax: Axes, roof: Roof, low: float, high: float, style: str) -> None:
    ridge = roof.flops / roof.bandwidth
    label = f"{roof.name}: {quantity(roof.flops, 'FLOP/s')}, {quantity(roof.bandwidth, 'B/s')}"
    xs = [low, ridge, high]
    ax.plot(xs, [min(roof.flops, roof.bandwidth * x) for x in xs], style, color="k", label=label)


def _draw_operations(ax: Axes, phase: Phase, roof: Roof) -> None:
    labels: list[tuple[float, float, list[str]]] = []  # neighbours share one
    shown = [row for row in phase.rows if row.operation.flops]
    for row in sorted(shown, key=lambda row: row.operation.intensity):
        op = row.operation
        top = roof.vector_flops if op.kind == "elementwise" else roof.flops
        x, y = op.intensity, min(top, roof.bandwidth * op.intensity)
        ax.scatter(x, y, s=15 + 300 * row.share, color=_COLOURS[op.kind], alpha=0.6)
        if labels and x < (3 if y == labels[-1][1] else 1.5) * labels[-1][0]:
            labels[-1] = x, y, [*labels[-1][2], op.name]
        else:
            labels.append((x, y, [op.name]))
    for x, y, names in labels:
        below = (-8, -12) if y >= roof.flops else (10, 0)
        ax.annotate("\n".join(names), (x, y), xytext=below, textcoords="offset points",
                    fontsize=7, va="top")  # fmt: skip


def _caption(report: RooflineReport) -> str:
    roofs = [report.roof] + ([report.ceiling] if report.ceiling else [])
    lines = [f"{r.name}: {quantity(r.flops, 'FLOP/s')}, {quantity(r.bandwidth, 'B/s')}, "
             f"ridge {r.flops / r.bandwidth:,.0f} FLOPs/B" for r in roofs]  # fmt: skip
    memory = report.chip.memory_bytes
    for phase in report.phases:
        line = f"{phase.name}: at most {phase.tokens_per_second:,.0f} tokens/s"
        if phase.measured_tokens_per_second is not None:
            line += f", {phase.measured_tokens_per_second:,.0f} under the ceilings here"
        what = "weights, gradients and AdamW" if phase.name == "train" else "weights and cache"
        line += f"; {quantity(phase.memory_bytes, 'B')} for {what}"
        if memory and phase.memory_bytes > memory:
            line += f" does not fit in {quantity(memory, 'B')}"
        lines.append(line)
    return "\n".join(lines)
