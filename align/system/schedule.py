"""What happened in which order: enough to make an asynchronous run again, to the bit.

A line of JSON an event, written as it happens. Between two events the system's parts share nothing,
so whoever does the same work in the order of the events gets the same bits; a reward is recorded,
for Python may give another one the next time.

| event | of | means |
| --- | --- | --- |
| begin | batch | its first tokens are drawn with the weights published last |
| advance | batch | the same for its next tokens |
| finish | batch, rewards | its groups go into the buffer |
| abandon | batch | its work is lost; its prompts wait for another `begin` |
| train | | a batch is taken from the buffer |
| publish | | the new weights, for all that follows |
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.files import write_file

_log = logging.getLogger(__name__)
Kind = Literal["begin", "advance", "finish", "abandon", "train", "publish"]


@dataclasses.dataclass(frozen=True)
class Event:
    """See the module."""

    kind: Kind
    batch: int = -1
    rewards: tuple[tuple[float, ...], ...] | None = None
    """[B][R], nan where there is none; what a float32 holds."""

    def line(self) -> str:
        """As JSON."""
        row: dict = {"kind": self.kind}
        if self.batch >= 0:
            row["batch"] = self.batch
        if self.rewards is not None:
            row["rewards"] = [[None if math.isnan(x) else x for x in r] for r in self.rewards]
        return json.dumps(row) + "\n"


def finished(batch: int, rewards: np.ndarray) -> Event:
    """The event of a batch with rewards float32 [B, R]."""
    return Event("finish", batch, tuple(tuple(map(float, row)) for row in rewards))


class Schedule:
    """Events, oldest first; with a file, also there. Where the disk is full the run goes on, but
    what is not in the file cannot be made again from it (`lost` counts such events)."""

    def __init__(self, file: Path | None = None, keep: int = 0) -> None:
        self.events: list[Event] = read(file)[:keep] if file is not None and keep else []
        self.lost = 0
        if file is not None and len(self.events) < keep:
            raise UserError(f"{file}: holds {len(self.events)} events of {keep}; it is not whole")
        self._file = file
        if file is not None:
            write_file(file, "".join(event.line() for event in self.events).encode())

    def add(self, event: Event) -> None:
        """Writes an event."""
        self.events.append(event)
        if self._file is None:
            return
        try:
            with open(self._file, "a") as file:
                file.write(event.line())
        except OSError as error:
            if not self.lost:
                _log.warning("schedule: cannot be written (%s); the run goes on", error)
            self.lost += 1


def read(file: str | Path) -> list[Event]:
    """The events of a file; a last line that was cut off is left out.

    Raises UserError where it is no schedule.
    """
    events = []
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rewards = row.get("rewards")
            if rewards is not None:
                rewards = tuple(tuple(math.nan if x is None else x for x in r) for r in rewards)
            event = Event(row["kind"], row.get("batch", -1), rewards)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{file}: line {number} is no event ({error})") from None
        if event.kind not in get_args(Kind):
            raise UserError(f"{file}: line {number}: no event {event.kind!r}")
        events.append(event)
    return events
