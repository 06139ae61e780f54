"""Renders the ledger into the tables of README.md and of the documentation.

A table stands between `<!-- ledger -->` and `<!-- /ledger -->`, each on a line of its own: all
entries, or with `<!-- ledger:NAMES -->` those that one of NAMES matches (`decode-*,train-*`).

    python -m benchmarks.tables            # writes what stands between the markers
    python -m benchmarks.tables --check    # exits with 1 where they differ
"""

from __future__ import annotations

import argparse
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

from jaxinfra.errors import UserError
from jaxinfra.files import write_file
from jaxinfra.measure import Entry, read_all

ROOT = Path(__file__).parents[1]
_OPENS = re.compile(r"^<!-- ledger.*-->$", re.MULTILINE)
_BETWEEN = re.compile(
    r"^(<!-- ledger(?::(\S+))? -->\n)((?:(?!<!-- ledger).)*?)^(<!-- /ledger -->)$",
    re.DOTALL | re.MULTILINE,
)
_HEAD = (
    "| what | this project | peer | ratio (95 %) | share of roofline | device | versions |\n"
    + "| --- " * 7
    + "|\n"
)


def row(entry: Entry, link: bool) -> str:
    """One line of the table; `link` leads from the root of the repository to the entry."""
    ours, *peers = entry.samples
    shown = {name: f"{_number(median(v))} {entry.unit}" for name, v in entry.samples.items()}
    ratio = share = "—"
    if entry.ratio is not None and entry.interval is not None:
        low, high = entry.interval
        ratio = f"{entry.ratio:.2f} ({low:.2f}–{high:.2f})"
    if entry.roofline is not None:
        share = f"{100 * entry.roofline:.3g} % of {entry.roof}"
    names = ("jax", "torch", "transformers") if peers else ("jax",)
    versions = ", ".join(f"{n} {entry.environment[n]}" for n in names if n in entry.environment)
    cells = (
        f"[{entry.claim}](benchmarks/results/{entry.name}.json)" if link else entry.claim,
        shown[ours], ", ".join(f"{name}: {shown[name]}" for name in peers) or "—",
        ratio, share, str(entry.environment["device"]), versions,
    )  # fmt: skip
    return "| " + " | ".join(" ".join(c.split()).replace("|", r"\|") for c in cells) + " |\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def render(text: str, entries: list[Entry], link: bool = True) -> str:
    """`text` with the ledger's tables between its markers.

    Raises UserError for a marker that is not closed or whose NAMES match no entry.
    """

    def table(match: re.Match) -> str:
        names = (match[2] or "*").split(",")
        chosen = [e for e in entries if any(fnmatchcase(e.name, name) for name in names)]
        if match[2] and not chosen:
            raise UserError(f"{match[1].strip()}: the ledger has no such entry; measure it first")
        body = _HEAD + "".join(row(entry, link) for entry in chosen) if chosen else ""
        return match[1] + body + match[4]

    rendered, tables = _BETWEEN.subn(table, text)
    if tables != len(_OPENS.findall(text)):
        raise UserError("a ledger marker is misspelt or not closed by <!-- /ledger -->")
    return rendered


def main(argv: list[str], root: Path = ROOT) -> int:
    """Writes the tables, or only checks them; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if they differ")
    check = parser.parse_args(argv).check
    pages = [path for path in (root / "docs").rglob("*.md") if "_build" not in path.parts]
    stale = False
    try:
        entries = read_all(root / "benchmarks" / "results")
        for path in [root / "README.md", *sorted(pages)]:
            text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
            try:
                rendered = render(text, entries, link=path.parent == root)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            if rendered != text:
                stale = True
                verb = "differs from the ledger; run `make tables`" if check else "written"
                print(f"{name}: {verb}")
                if not check:
                    write_file(path, rendered.encode())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return int(stale and check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
