"""Child processes that end when they are told to: bounded output, wall time, a killed group.

The child leads its own process group, so SIGKILL to the group reaches what it started, whatever
signals those ignore. Only a process that left the group on purpose escapes; `agent.sandbox` closes
that way too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anyio
import anyio.abc


@dataclass(frozen=True)
class Finished:
    """How a process ended. `code` is its exit status, negative for a signal; `ended_by` is "time"
    or "output" where a bound ended it, else None."""

    code: int
    stdout: bytes
    stderr: bytes
    ended_by: str | None = None


async def run_process(
    argv: Sequence[str], *, stdin: bytes = b"", seconds: float | None = None,
    max_output: int = 1_000_000, env: Mapping[str, str] | None = None, cwd: str | None = None,
    pass_fds: Sequence[int] = (),
) -> Finished:  # fmt: skip
    """Runs `argv` to its end; kills its group when `seconds` or `max_output` bytes are over, when
    the caller is cancelled, and when it leaves children behind."""
    process = await anyio.open_process(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=env, cwd=cwd, start_new_session=True, pass_fds=pass_fds,
    )  # fmt: skip
    out, err = bytearray(), bytearray()
    ended_by: str | None = None

    async def read(stream: anyio.abc.ByteReceiveStream, into: bytearray) -> None:
        nonlocal ended_by
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                into += await stream.receive(65536)
                if len(out) + len(err) > max_output:
                    ended_by = ended_by or "output"
                    kill_group(process.pid)
                    return

    async def write() -> None:
        assert process.stdin is not None
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            if stdin:
                await process.stdin.send(stdin)
        await process.stdin.aclose()

    assert process.stdout is not None and process.stderr is not None
    try:
        with anyio.move_on_after(seconds) as limit:
            async with anyio.create_task_group() as group:
                group.start_soon(read, process.stdout, out)
                group.start_soon(read, process.stderr, err)
                group.start_soon(write)
                await process.wait()
                # A child left behind would hold the pipes open for ever.
                kill_group(process.pid)
        if limit.cancelled_caught:
            ended_by = "time"
    finally:
        kill_group(process.pid)
        with anyio.CancelScope(shield=True):
            await process.wait()
            await process.aclose()
    assert process.returncode is not None
    return Finished(process.returncode, bytes(out[:max_output]), bytes(err[:max_output]), ended_by)


def kill_group(group: int) -> None:
    """SIGKILL to a process group, if any of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
