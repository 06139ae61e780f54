"""What a run tells: one line of JSON a step, TensorBoard where it is installed, and its speed.

`metrics.jsonl` has a line a step: step (from 1), loss, nll (nats a token), grad_norm, lr, tokens,
skipped; and, once `log_every` steps have passed, tokens_per_s (wall time, over that many steps),
mfu and memory_bytes; validation_nll and sample where there was one. A number
that is not finite is null.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxinfra.files import write_file, writing


class MetricsLog:
    """Writes rows to `FOLDER/metrics.jsonl`, each flushed at once, and TensorBoard's event files.

    After a resume at `step`, lines of later steps are removed first; TensorBoard's files are told
    to purge theirs.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._file = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self._file) if row["step"] <= step] if step else []
        write_file(self._file, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._stream = open(self._file, "a")  # noqa: SIM115
        self._events = _events(folder / "tensorboard", step)

    def write(self, row: dict[str, Any]) -> None:
        """Adds one step's row."""
        finite = {name: None if _not_finite(value) else value for name, value in row.items()}
        with writing(self._file, "give another --out"):
            self._stream.write(json.dumps(finite) + "\n")
            self._stream.flush()
        if self._events is not None:
            self._events.write(row)

    def close(self) -> None:
        """Ends all files."""
        with contextlib.suppress(OSError):  # `write` told of it
            self._stream.close()
        if self._events is not None:
            self._events.close()


def read_metrics(file: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line that was cut off or damaged is left out."""
    rows = []
    if Path(file).exists():
        for line in Path(file).read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


class Meter:
    """Tokens/s over the last `every` steps, and what follows from it."""

    def __init__(self, every: int, flops_per_token: float | None, peak_flops: float | None) -> None:
        self._every, self._flops, self._peak = every, flops_per_token, peak_flops
        self._rates: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Begins an interval now: after what is not training (a compile, an evaluation)."""
        self._since, self._tokens, self._steps = time.perf_counter(), 0, 0

    def add(self, tokens: int) -> dict[str, float]:
        """Counts a step that the device has finished; gives the rates of the last interval."""
        self._tokens += tokens
        self._steps += 1
        if self._steps >= self._every:
            rate = self._tokens / (time.perf_counter() - self._since)
            self._rates = {"tokens_per_s": rate, "memory_bytes": peak_memory()}
            if self._flops and self._peak:
                self._rates["mfu"] = rate * self._flops / self._peak
            self.restart()
        return self._rates


def peak_memory() -> int:
    """Bytes: the most the device has held, or this process where the device does not count."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return own if sys.platform == "darwin" else own * 1024


class _Events:
    """Scalars and texts as TensorBoard's event files, through the package tensorboard alone."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        made: tuple[Any, Any] = event_pb2, summary_pb2  # on import, out of a type checker's sight
        events, summaries = made
        self._event, self._summary = events.Event, summaries.Summary
        self._writer = EventFileWriter(str(folder))
        start = events.SessionLog(status=events.SessionLog.START)
        self._add(step=step + 1, session_log=start)  # tells to purge what was written past here

    def write(self, row: dict[str, Any]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._add(step=row["step"], summary=self._summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _add(self, **fields: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), **fields))


def _events(folder: Path, step: int) -> _Events | None:
    return _Events(folder, step) if importlib.util.find_spec("tensorboard") else None


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
