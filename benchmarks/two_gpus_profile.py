"""How much of a step's messages other kernels hide, read from a trace of the profiler.

A collective's kernel spins until its neighbour has sent, so its time is what a program waits for
unless something else runs on the same device meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Intervals in seconds, of one device."""

    messages: list[Interval]
    others: list[Interval]


def collective_time(folder: str) -> Kernels:
    """The kernels of the first GPU in a trace that `jax.profiler.trace` wrote.

    Raises RuntimeError where the trace has none.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise RuntimeError("the profiler wrote no trace")
    messages: list[Interval] = []
    others: list[Interval] = []
    for plane in jax.profiler.ProfileData.from_file(str(files[0])).planes:
        if "GPU:0" not in plane.name:
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue  # other lines repeat the same time by module, operation and source
            for event in line.events:
                start = event.start_ns * 1e-9
                where = messages if is_message(event.name) else others
                where.append((start, start + event.duration_ns * 1e-9))
    if not others:
        raise RuntimeError("the trace holds no kernel of GPU 0")
    return Kernels(messages, others)


def is_message(kernel: str) -> bool:
    """Whether a kernel is a collective's: NCCL's, XLA's own all-reduce, or a copy between GPUs."""
    name = kernel.lower()
    return any(word in name for word in ("nccl", "allreduce", "all_reduce", "memcpyp2p"))


def hidden(kernels: Kernels) -> tuple[float, float, float]:
    """(seconds in messages, of these with another kernel running, seconds with any kernel)."""
    messages, others = union(kernels.messages), union(kernels.others)
    both = union([*messages, *others])
    of = lambda spans: sum(end - start for start, end in spans)  # noqa: E731
    return of(messages), of(messages) + of(others) - of(both), of(both)


def union(spans: Iterable[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    merged: list[Interval] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
