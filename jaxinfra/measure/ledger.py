"""The ledger: every published figure in a JSON file of its own, with what it takes to doubt it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfra.errors import UserError
from jaxinfra.files import write_file


@dataclasses.dataclass(frozen=True)
class Entry:
    """One comparison or figure. The first of `samples` is this project's.

    Raises UserError naming the field that is missing or impossible.
    """

    name: str  # of the file, without .json: lower case letters, digits, hyphens
    claim: str  # one sentence
    command: str  # that measures it again
    unit: str  # of the samples: "tokens/s", "s"
    samples: Mapping[str, list[float]]  # raw, by contestant
    ratio: float | None  # how many times better the first is than the second
    interval: tuple[float, float] | None  # 95 %, of the ratio
    roofline: float | None  # share of the roof, 0.46 for 46 %
    roof: str  # which roof that is, or why there is none
    inputs: str  # their distribution and sizes
    mislead: str  # how the figure could mislead
    environment: Mapping[str, Any]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("name", "claim", "command", "unit", "roof", "inputs", "mislead"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise self._wrong(f"{field} is empty; say it")
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise self._wrong("name is a file's: lower case letters, digits and hyphens")
        for field in ("jax", "device"):
            if field not in self.environment:
                raise self._wrong(f"environment lacks {field!r}; give measure.environment()")
        if not self.samples or not all(self.samples.values()):
            raise self._wrong("samples are missing; keep the raw ones")
        if not all(math.isfinite(x) for values in self.samples.values() for x in values):
            raise self._wrong("samples hold a number that is not finite; measure again")
        if (self.ratio is None) != (self.interval is None):
            raise self._wrong("ratio and interval come together; give both or None for both")
        if self.ratio is not None and self.interval is not None:
            low, high = self.interval
            if not 0 < low <= high < math.inf or not 0 < self.ratio < math.inf:
                raise self._wrong("ratio and interval must be positive, finite and in order")
            if len(self.samples) < 2:
                raise self._wrong("samples of the peer are missing; a ratio is of two")
        if self.roofline is not None and not 0 < self.roofline < math.inf:
            raise self._wrong("roofline is a share of the roof, 0.46 for 46 %")

    def _wrong(self, what: str) -> UserError:
        return UserError(f"ledger entry {self.name!r}: {what}")


def write(entry: Entry, folder: str | Path) -> Path:
    """Writes `folder`/NAME.json, whole or not at all; the same entry gives the same bytes."""
    path = Path(folder) / f"{entry.name}.json"
    text = json.dumps(dataclasses.asdict(entry), indent=1, ensure_ascii=False, allow_nan=False)
    write_file(path, (text + "\n").encode())
    return path


def read_all(folder: str | Path) -> list[Entry]:
    """All entries of `folder`, by name; raises UserError naming the file and what is wrong."""
    entries = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            fields = {field.name: field for field in dataclasses.fields(Entry)}
            missing = [name for name in fields if name not in raw and name != "extra"]
            unknown = [name for name in raw if name not in fields]
            if missing or unknown:
                raise ValueError(f"missing: {missing}, unknown: {unknown}")
            low_high = raw["interval"]
            raw["interval"] = low_high and (low_high[0], low_high[1])
            entry = Entry(**raw)
            if entry.name != path.stem:
                raise ValueError(f"its name is {entry.name!r}")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"{path}: not a ledger entry ({error}); measure it again") from None
        entries.append(entry)
    return entries
