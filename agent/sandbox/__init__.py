"""A sandbox for code and commands that a model wrote, out of what the Linux kernel itself offers.

    sandbox = Sandbox()
    print(sandbox.describe())
    ended = await sandbox.run(["/bin/sh", "-c", "echo hello > file; cat file"])

Two levels, the stronger first. "namespaces": a root of its own (read-only system, an empty /box in
memory), its own processes and an empty network. "landlock": the host's files, but only the allowed
ones, and no network. Both under a seccomp filter, resource limits, an unprivileged user where we
are root, a watch over memory, a wall clock, a cap on output, and SIGKILL to all of it at the end.
Where neither level is to be had it refuses: nothing ever runs without. About 50 ms a box.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agent.processes import Finished, run_process
from jaxinfra.errors import UserError

LevelName = Literal["namespaces", "landlock"]
_LAUNCHER = str(Path(__file__).with_name("launcher.py"))
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache",
           "/etc/alternatives")  # fmt: skip
_boxes = itertools.count(os.getpid() * 7)
PYTHON = os.path.realpath(sys.executable)  # the interpreter without the environment's packages


@dataclass(frozen=True)
class Bounds:
    """What a program may use: seconds on the wall and of each process's CPU, bytes of memory (each
    process's addresses, and all processes' pages together), processes, open files, bytes of one
    file and of all, entries of folders, output bytes."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 512 << 20
    processes: int = 32
    open_files: int = 64
    file_bytes: int = 64 << 20
    disk_bytes: int = 64 << 20
    entries: int = 4096
    output: int = 1 << 20


@dataclass(frozen=True)
class Level:
    """The level obtained, the layers in place, and what they leave unbounded."""

    name: LevelName
    layers: tuple[str, ...]
    open: tuple[str, ...]


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs; each `run` is a new box.

    `readable` are more paths to be read; `work`, instead of an empty folder in memory, a folder
    that is kept and written (owned by the sandbox's user afterwards where we are root). `level`
    asks for one level and refuses the other.
    """

    bounds: Bounds = field(default_factory=Bounds)
    readable: tuple[str, ...] = ()
    work: str | None = None
    level: LevelName | None = None

    def describe(self) -> Level:
        """The level this machine gives; raises UserError where that is none, or not `level`."""
        name = self._obtain()
        layers = ["seccomp", "rlimits", "no_new_privs", "process-group kill"]
        left: list[str] = []
        if _landlock_version():
            layers.insert(0, f"landlock {_landlock_version()}")
        if name == "namespaces":
            layers.insert(0, "namespaces: mount, pid, net, ipc, uts, cgroup")
            left += ["bytes of the kept folder"] if self.work is not None else []
        else:
            left += ["bytes and entries of the work folder together", "names and sizes of files"]
            left += ["signals to the same user's processes"] if _landlock_version() < 6 else []
        if os.geteuid() == 0 and self._user(name, self.work) is None:
            left.append("number of processes, but for a look every 50 ms")
        return Level(name, tuple(layers), tuple(left))

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> Finished:
        """Runs `argv` (its first entry an absolute path) in a new box, in its work folder. `code`
        is 128 + n where signal n ended it."""
        name = self._obtain()
        if not argv or not os.path.isabs(argv[0]):
            raise UserError(f"sandbox: give the program's whole path, not {list(argv[:1])}")
        with contextlib.ExitStack() as stack:
            work = self.work
            if name == "landlock" and work is None:
                folder = tempfile.TemporaryDirectory(prefix="box-", ignore_cleanup_errors=True)
                work = stack.enter_context(folder)
            plan = self._plan(name, argv, work, env or {})
            command, descriptors, told = stack.enter_context(_planned(plan))
            ended = await run_process(
                command, stdin=stdin, seconds=self.bounds.seconds,
                max_output=self.bounds.output, env={}, cwd="/", pass_fds=descriptors,
            )  # fmt: skip
            answer = told()
        if answer != b"ok" and ended.ended_by is None:
            raise UserError(f"sandbox: {answer.decode(errors='replace') or 'did not start'}")
        return ended

    def _plan(
        self, name: LevelName, argv: Sequence[str], work: str | None, env: Mapping[str, str]
    ) -> dict[str, Any]:
        b = self.bounds
        python = os.path.dirname(os.path.dirname(PYTHON))
        readable = [*_SYSTEM, *([] if python == "/usr" else [python]), *self.readable]
        return {
            "level": name,
            "argv": list(argv),
            "parent": os.getpid(),
            "readable": [os.path.abspath(path) for path in readable],
            "devices": ["/dev/random", "/dev/urandom", "/dev/null", "/dev/zero"],
            "work": None if work is None else os.path.realpath(work),
            "user": self._user(name, work),
            "landlock": bool(_landlock_version()),
            "disk_bytes": b.disk_bytes,
            "entries": b.entries,
            "memory": b.memory,
            "rlimits": {
                "AS": b.memory, "CPU": b.cpu_seconds, "NPROC": b.processes,
                "NOFILE": b.open_files, "FSIZE": b.file_bytes, "CORE": 0, "MEMLOCK": 0,
            },
            "env": {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "", **env},
        }  # fmt: skip

    def _user(self, name: LevelName, work: str | None) -> int | None:
        """Whom root becomes: another number for each box, as processes are counted by user, and
        always the same for a folder that is kept."""
        if os.geteuid() or (name == "landlock" and not _open_to_others(PYTHON)):
            return None
        kept = self.work is not None
        return 60_000 + (zlib.crc32(str(work).encode()) if kept else next(_boxes)) % 5_000

    def _obtain(self) -> LevelName:
        reasons = []
        for name in (self.level,) if self.level else ("namespaces", "landlock"):
            reason = _unavailable(name)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise UserError(
            f"sandbox: refused, nothing would confine the program ({'; '.join(reasons)})"
        )


@contextlib.contextmanager
def _planned(plan: dict[str, Any]) -> Iterator[tuple[list[str], list[int], Callable[[], bytes]]]:
    """The launcher's command for the plan, the file descriptors it needs, and a function that gives
    its answer once it has ended."""
    told, status = os.pipe()
    with (
        open(told, "rb", buffering=0) as answer,
        open(status, "wb", buffering=0) as end,
        tempfile.TemporaryFile() as file,
    ):
        file.write(json.dumps({**plan, "status": status}).encode())
        file.seek(0)

        def ask() -> bytes:
            os.set_blocking(told, False)
            end.close()
            return answer.read() or b""

        command = [PYTHON, "-I", "-S", _LAUNCHER, str(file.fileno())]
        yield command, [file.fileno(), status], ask


def _open_to_others(path: str) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in Path(path).parents)


@functools.cache
def _landlock_version() -> int:
    if sys.platform != "linux":
        return 0
    from agent.sandbox import landlock

    return landlock.version()


@functools.cache
def _unavailable(name: LevelName) -> str | None:
    """Why this machine does not give the level, found by trying it; None where it does."""
    if sys.platform != "linux":
        return "needs Linux"
    from agent.sandbox import seccomp

    if reason := seccomp.supported():
        return reason
    if name == "landlock" and not _landlock_version():
        return "the kernel has no Landlock"
    with tempfile.TemporaryDirectory(prefix="box-") as work:
        plan = Sandbox()._plan(name, [PYTHON, "-I", "-S", "-c", ""], work, {})
        with _planned(plan) as (command, descriptors, told):
            done = subprocess.run(
                command, env={}, cwd="/", pass_fds=descriptors, capture_output=True, timeout=30,
                start_new_session=True,  # the launcher bounds, and ends, its whole group
            )  # fmt: skip
            answer = told()
    if answer == b"ok" and done.returncode == 0:
        return None
    return answer.decode(errors="replace") if answer != b"ok" else done.stderr.decode()[-200:]
