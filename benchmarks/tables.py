"""Renders the ledger into the tables of README.md and of the documentation.

python -m benchmarks.tables            # writes what stands between the markers
python -m benchmarks.tables --check    # exits with 1 where they differ
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from statistics import median

from jaxinfra.files import write_file
from jaxinfra.measure import Entry, read_all

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_BETWEEN = re.compile(r"(<!-- ledger -->\n).*?(<!-- /ledger -->)", re.DOTALL)
_HEAD = (
    "| what | median | beside | ratio (95 %) | roof | device, versions |\n" + "| --- " * 6 + "|\n"
)


def row(entry: Entry) -> str:
    """One line of the table."""
    ours, *peers = entry.samples
    shown = {name: f"{median(values):,.4g} {entry.unit}" for name, values in entry.samples.items()}
    beside = ", ".join(f"{name}: {shown[name]}" for name in peers) or "—"
    ratio = "—"
    if entry.ratio is not None and entry.interval is not None:
        low, high = entry.interval
        ratio = f"{entry.ratio:.2f} ({low:.2f}–{high:.2f})"
    names = ("jax", "torch", "transformers") if peers else ("jax",)
    versions = ", ".join(f"{n} {entry.environment[n]}" for n in names if n in entry.environment)
    cells = (
        f"[{entry.claim}](benchmarks/results/{entry.name}.json)", shown[ours], beside, ratio,
        entry.roofline, f"{entry.environment['device']}; {versions}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |\n"


def render(text: str, entries: list[Entry]) -> str:
    """`text` with the ledger's table between its markers."""
    table = _HEAD + "".join(map(row, entries)) if entries else ""
    return _BETWEEN.sub(lambda match: match[1] + table + match[2], text)


def main(argv: list[str]) -> int:
    """Writes the tables, or only checks them; the exit status."""
    entries, stale = read_all(RESULTS), []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        rendered = render(text, entries)
        if rendered != text:
            stale.append(path)
            if "--check" not in argv:
                write_file(path, rendered.encode())
    for path in stale:
        verb = "differs from the ledger; run `make tables`" if "--check" in argv else "written"
        print(f"{path.relative_to(ROOT)}: {verb}")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
