"""Our sandbox as a provider of Inspect's: `Task(..., sandbox="jaxinfra")`, by an entry point.

A sample has a folder of its own that its commands share, at /box and /tmp; every command is a new
box around it, so no process outlives its command. Files are read and written by programs inside the
box as well: a link that points out of it leads nowhere. There is one user, and no service stays up
between commands, so tools that Inspect injects as a server (`exec_remote`) are not to be had.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import errno
import os
import tempfile
from typing import Any, NoReturn

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
    sandboxenv,
)

from agent.processes import Finished
from agent.sandbox import Bounds, Sandbox

_EXEC = 'cd -- "$0" && exec "$@"'
# What the scripts exit with where a file is not to be had; the shell's own are 126 and 127.
_REASONS = {91: errno.ENOENT, 92: errno.EISDIR, 93: errno.EACCES}
_READ = """
test -d "$1" && exit 92
test -e "$1" || exit 91
test -r "$1" || exit 93
exec cat -- "$1"
"""
_WRITE = """
test -d "$1" && exit 92
mkdir -p -- "$(dirname -- "$1")" || exit 94
if test -e "$1"; then test -w "$1" || exit 93; fi
exec cat > "$1"
"""
_LONGEST = 600  # seconds of a command without a timeout
_MEMORY = 2 << 30


@sandboxenv(name="jaxinfra")
class BoxEnvironment(SandboxEnvironment):
    """One sample's folder and the boxes around it. A command without a timeout ends after
    600 seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="sample-", ignore_cleanup_errors=True)

    @classmethod
    async def task_init(cls, task_name: str, config: Any) -> None:
        """Refuses before the first sample where there is no sandbox to be had."""
        Sandbox(level="namespaces").describe()

    @classmethod
    async def sample_init(
        cls, task_name: str, config: Any, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        return {"default": cls()}

    @classmethod
    async def sample_cleanup(
        cls, task_name: str, config: Any, environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:  # fmt: skip
        for environment in environments.values():
            environment.as_type(cls).folder.cleanup()

    async def exec(
        self, cmd: list[str], input: str | bytes | None = None, cwd: str | None = None,
        env: dict[str, str] | None = None, user: str | None = None, timeout: int | None = None,
        timeout_retry: bool = True, concurrency: bool = True,
    ) -> ExecResult[str]:  # fmt: skip
        if user is not None:
            raise SandboxUserUnsupportedError(f"the sandbox has one user, and it is not {user!r}")
        largest = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        ended = await self._run(
            ["/bin/sh", "-c", _EXEC, cwd or "/box", *cmd], input, 2 * largest, timeout, env
        )
        out, err = (
            text.decode("utf-8", "replace").replace("\r\n", "\n")
            for text in (ended.stdout, ended.stderr)
        )
        if max(len(ended.stdout), len(ended.stderr)) > largest or ended.ended_by == "output":
            limit = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR
            raise OutputLimitExceededError(limit, out[:largest])
        if ended.code == 126 and "ermission denied" in err:
            raise PermissionError(err.strip())
        return ExecResult(ended.code == 0, ended.code, out, err)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        ended = await self._run(["/bin/sh", "-c", _WRITE, "write", file], contents, 1 << 16)
        if ended.code:
            _fail(file, ended)

    async def read_file(self, file: str, text: bool = True) -> Any:
        largest = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        ended = await self._run(["/bin/sh", "-c", _READ, "read", file], None, largest)
        if ended.ended_by == "output":
            limit = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR
            raise OutputLimitExceededError(limit, None)
        if ended.code:
            _fail(file, ended)
        return ended.stdout.decode() if text else ended.stdout

    async def _run(
        self, argv: list[str], input: str | bytes | None, output: int,
        timeout: int | None = None, env: dict[str, str] | None = None,
    ) -> Finished:  # fmt: skip
        seconds = timeout or _LONGEST
        bounds = Bounds(
            seconds=seconds, cpu_seconds=seconds, memory=_MEMORY, processes=256, open_files=1024,
            file_bytes=1 << 30, output=output,
        )  # fmt: skip
        sandbox = Sandbox(bounds, work=self.folder.name, level="namespaces")
        given = input.encode() if isinstance(input, str) else input or b""
        ended = await sandbox.run(argv, stdin=given, env=env)
        if ended.ended_by == "time":
            raise TimeoutError(f"longer than {seconds} s")
        return ended


def _fail(file: str, ended: Finished) -> NoReturn:
    told = ended.stderr.decode("utf-8", "replace").strip()
    number = _REASONS.get(ended.code, errno.EACCES if "denied" in told else errno.EIO)
    raise OSError(number, told or os.strerror(number), file)  # of the class that the number has
