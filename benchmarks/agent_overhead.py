"""What the agent framework costs a turn: two hundred sessions at once, one process, one journal.

    python -m benchmarks.agent_overhead        # a minute, on two idle cores

`agent.evaluate.load`, five times: the overhead of a turn is what passes from the end of a model's
thought to the beginning of its next one, the journal's flush to disk included.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio

from agent.evaluate.load import load

SESSIONS, TURNS, THINK, ROUNDS = 200, 10, 1.0, 5


def main() -> None:
    """Measures and writes the ledger's entry."""
    import jax  # noqa: F401  (so that the conditions name its version)

    from jaxinfra.measure import Entry, environment, write

    sys.setswitchinterval(0.0005)  # as `jaxinfra agent serve` does
    made = []
    for _ in range(ROUNDS):
        with TemporaryDirectory() as folder:
            made.append(anyio.run(load, SESSIONS, TURNS, THINK, Path(folder) / "journal"))
        print(f"{made[-1].p50:.1f} ms (median), {made[-1].p99:.1f} ms (p99)")
        assert made[-1].events == made[-1].expected
    entry = Entry(
        name="agent-overhead-200-sessions",
        claim=f"99th percentile of the overhead a turn, {SESSIONS} agent sessions in one process",
        command="python -m benchmarks.agent_overhead",
        unit="ms",
        samples={"jaxinfra": [one.p99 for one in made]},
        ratio=None,
        interval=None,
        roofline=None,
        roof="none: most of it is waiting for the disk's flush and for a processor",
        inputs=f"{TURNS} turns a session, each a call of a pure tool; thoughts of {THINK / 2:g} to "
        f"{THINK * 1.5:g} s, uniform",
        mislead="The model is scripted and takes no processor; a real one in the same process, or "
        "other work on the machine, lengthens every turn",
        environment=environment(),
        extra={"median_ms": [one.p50 for one in made], "longest_ms": [one.longest for one in made],
               "turns_per_second": [one.turns / one.seconds for one in made]},
    )  # fmt: skip
    write(entry, os.environ.get("OUT", "benchmarks/results"))


if __name__ == "__main__":
    main()
