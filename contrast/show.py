"""Two frameworks side by side in a terminal: a claim, and a table with a column a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxinfra.errors import UserError

Facts = Mapping[str, object]  # what was found of one framework, by the name of its row


def side_by_side(claim: str, sides: Mapping[str, Callable[[], Facts]]) -> dict[str, Facts]:
    """Runs each side, prints their facts, and returns them by framework.

    A side that cannot run here says why below the table, and the others are shown.
    """
    found: dict[str, Facts] = {}
    reasons = []
    for name, side in sides.items():
        try:
            found[name] = side()
        except UserError as error:
            reasons.append(f"{name}: {error}")
    rows = list(dict.fromkeys(row for facts in found.values() for row in facts))
    print(claim)
    if rows:
        columns = [[row, *(facts.get(row, "—") for facts in found.values())] for row in rows]
        print(table(["", *found], columns))
    for reason in reasons:
        print(reason)
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines of columns, numbers to the right."""
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [_line(header, widths, header), _line(["-" * w for w in widths], widths, header)]
    lines += [_line(texts, widths, row) for texts, row in zip(cells, rows, strict=True)]
    return "\n".join(lines)


def _line(texts: Sequence[str], widths: Sequence[int], values: Sequence[object]) -> str:
    pairs = zip(texts, widths, values, strict=True)
    return "  ".join(t.rjust(w) if _is_number(v) else t.ljust(w) for t, w, v in pairs).rstrip()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
