"""The ledger: every published figure in a JSON file of its own, with what it takes to doubt it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfra.errors import UserError
from jaxinfra.files import write_file


@dataclasses.dataclass(frozen=True)
class Entry:
    """One comparison or figure. The first of `samples` is this project's."""

    name: str  # of the file, without .json
    claim: str  # one sentence
    command: str  # that measures it again
    unit: str  # of the samples: "tokens/s", "s"
    samples: Mapping[str, list[float]]  # raw, by contestant
    ratio: float | None  # how many times better the first is than the second
    interval: tuple[float, float] | None  # 95 %, of the ratio
    roofline: str  # share of the roof and which roof, or why there is none
    inputs: str  # their distribution and sizes
    mislead: str  # how the figure could mislead
    environment: Mapping[str, Any]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("name", "claim", "command", "unit", "roofline", "inputs", "mislead"):
            if not getattr(self, field):
                raise UserError(f"ledger entry {self.name!r}: {field} is empty; say it")
        if not self.samples or not all(self.samples.values()):
            raise UserError(f"ledger entry {self.name!r}: samples are missing; keep the raw ones")
        if (self.ratio is None) != (self.interval is None):
            raise UserError(f"ledger entry {self.name!r}: a ratio comes with its interval")


def write(entry: Entry, folder: str | Path) -> Path:
    """Writes `folder`/NAME.json, whole or not at all."""
    path = Path(folder) / f"{entry.name}.json"
    write_file(path, (json.dumps(dataclasses.asdict(entry), indent=1) + "\n").encode())
    return path


def read_all(folder: str | Path) -> list[Entry]:
    """All entries of `folder`, by name."""
    entries = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            raw = json.loads(path.read_text())
            interval = raw.pop("interval")
            entries.append(Entry(**raw, interval=interval and (interval[0], interval[1])))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not a ledger entry ({error}); measure it again") from None
    return entries
