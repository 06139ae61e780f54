"""Contestants in processes of their own, which take turns.

A process that also holds another framework's threads, allocator and compiled graphs is not the
process that a user would run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class Contestant:
    """`python -m MODULE NAME`, a process that answers every line by one line of JSON."""

    def __init__(self, module: str, name: str, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | env,
        )  # fmt: skip

    def turn(self) -> Any:
        """The result of one turn."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"{self._process.args}: ended with {self._process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process, which leaves the device's memory."""
        with self._process:
            pass


def answer(turn: Callable[[], Any]) -> None:
    """The other side: one `turn()` for every line that comes; other output goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    for _ in sys.stdin:
        print(json.dumps(turn()), file=out, flush=True)
