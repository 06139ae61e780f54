"""What an engine tells of itself. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Info:
    """What an engine turned out to be."""

    max_len: int  # tokens of a prompt and its answer together
    page_size: int
    pages: int


@dataclass(frozen=True)
class EngineStats:
    """The engine at a moment; counters are since its start.

    compiles: programs compiled while a request waited for them. ready: programs of `programs` that
    are compiled. host_s: seconds of the host's own work in all steps.
    """

    running: int
    waiting: int
    pages_used: int
    pages_cached: int
    pages_free: int
    tokens_per_second: float
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    compiles: int
    drafted: int
    accepted: int
    steps: int
    host_s: float
    ready: int
    programs: int
