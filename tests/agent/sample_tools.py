"""Tools that tests import from other processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from agent.tools import ToolFailed, tool


@tool(timeout=200.0, effects="pure")
def add(a: int, b: int) -> int:
    """Adds.

    Args:
      a: one number.
      b: another.
    """
    print("a tool may print")
    return a + b


@tool(timeout=2.0, effects="pure")
def stubborn(pid_file: str) -> str:
    """Ignores SIGTERM, starts a child that does too, and never ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal,time; signal.signal(15, signal.SIG_IGN)\n"
         "while True: time.sleep(1)"]
    )  # fmt: skip
    Path(pid_file).write_text(f"{os.getpid()} {child.pid}")
    while True:
        time.sleep(1)


@tool(timeout=200.0, effects="pure")
def crash() -> str:
    """Dies."""
    os._exit(3)


@tool(timeout=200.0, effects="pure")
def refuse() -> str:
    """Fails in words."""
    raise ToolFailed("not today")
