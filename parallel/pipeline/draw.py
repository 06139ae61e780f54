"""A schedule as a picture: stages down, ticks to the right."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from parallel.pipeline.schedule import B, F, Schedule, W

_COLOURS = {F: ("#9ecae1", "#4292c6"), B: ("#a1d99b", "#41ab5d"), W: ("#fdd0a2", "#fd8d3c")}


def text(schedule: Schedule) -> str:
    """One line a stage; F0 is the forward of microbatch 0, F0' that of its second chunk."""
    cells = [
        [
            "".join(f"{t.kind}{t.microbatch}" + "'" * t.chunk for t in row[s])
            for row in schedule.table
        ]
        for s in range(schedule.stages)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " ".join((c or ".").ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells
    ]
    return "\n".join(f"stage {s} | {line.rstrip()}" for s, line in enumerate(lines))


def figure(schedule: Schedule) -> Figure:
    """The table in colours; a cell with two tasks is cut in two, later chunks are darker."""
    ticks = len(schedule.table)
    fig = Figure(figsize=(max(6.0, ticks * 0.32), 0.6 + 0.45 * schedule.stages))
    ax = fig.subplots()
    for tick, row in enumerate(schedule.table):
        for s, cell in enumerate(row):
            for i, task in enumerate(cell):
                width = 1 / len(cell)
                colour = _COLOURS[task.kind][min(task.chunk, 1)]
                place = (tick + i * width, s)
                ax.add_patch(Rectangle(place, width, 1, facecolor=colour, edgecolor="white"))
                ax.text(
                    place[0] + width / 2, s + 0.5, str(task.microbatch),
                    ha="center", va="center", fontsize=7,
                )  # fmt: skip
    ax.set_xlim(0, ticks)
    ax.set_ylim(schedule.stages, 0)
    ax.set_yticks(
        [s + 0.5 for s in range(schedule.stages)], [str(s) for s in range(schedule.stages)]
    )
    ax.set_ylabel("stage")
    ax.set_xlabel("tick")
    ax.set_title(str(schedule), fontsize=9)
    return fig
