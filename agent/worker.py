"""The process of one call of a sync tool that has a timeout, as `agent.execute` starts it.

Reads where the function is and its arguments from standard input, writes the result to standard
output. The tool's own prints go to standard error, so they cannot be taken for a result.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs the call and exits with 0; a tool's failure is a result too."""
    if sys.platform == "linux":  # also a caller that was killed leaves no process behind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = json.loads(sys.stdin.read())
    if os.getppid() != work["parent"]:  # it died before we asked to be told
        sys.exit(1)
    from agent.tools import ToolFailed, as_text, importable

    called = importable(work["function"])
    try:
        value = called.function(**called.parse(work["arguments"]))
        text = as_text(value) if not hasattr(value, "__next__") else "".join(map(as_text, value))
        answer = {"ok": text}
    except ToolFailed as error:
        answer = {"failed": str(error)}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    json.dump(answer, out)
    out.close()
