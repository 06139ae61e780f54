"""The process that turns itself into a sandbox and then into the program: standard library only.

    python -I -S agent/sandbox/launcher.py PLAN     # a file descriptor with {"level": ...} in it

Writes "ok", or why not, to the file descriptor `status`. The program starts only when every layer
that the plan names is in place. The first process stays outside as the watch: it ends all of them
when they hold too much memory together, or when whoever started it has died.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

if not __package__:  # run as a file: the package would import far more than a sandbox may see
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import landlock
    import namespaces
    import seccomp
else:
    from agent.sandbox import landlock, namespaces, seccomp

_PDEATHSIG, _NO_NEW_PRIVS = 1, 38
_LOOK = 0.05  # seconds between two looks at the memory
OVER = 124  # the exit status when the watch ended them
_SIGNALS = {signal.SIGCHLD, signal.SIGTERM}
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Runs the plan in `argv[1]`; exits with the program's status, 128 + n for a signal."""
    with open(int(sys.argv[1]), "rb") as file:
        plan = json.load(file)
    status = plan["status"]
    os.set_inheritable(status, False)
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _libc.prctl(_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != plan["parent"]:  # it died before we asked to be told
        os._exit(125)
    try:
        namespaced = plan["level"] == "namespaces"
        proc = os.open("/proc", os.O_RDONLY)  # the one that shows us the box's processes
        if namespaced:
            namespaces.unshare()
        child = os.fork()
        if child:
            os.close(status)
            _watch(child, proc, plan["memory"], plan["rlimits"]["NPROC"])
        _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if plan["work"] is not None and plan["user"] is not None:
            os.chown(plan["work"], plan["user"], plan["user"])
        if namespaced:
            namespaces.build_root(
                plan["readable"], plan["work"], plan["disk_bytes"], plan["entries"]
            )
            program = os.fork()
            if program:
                os.close(status)
                _reap_until(program)
            folder, writable, readable = "/box", ["/box", "/tmp", "/dev"], ["/"]
        else:
            folder = plan["work"]
            writable, readable = [folder, "/dev/null", "/dev/zero"], plan["readable"]
        _become(plan, folder, readable, writable)
    except OSError as error:
        os.write(status, f"{error.strerror or error}: {error.filename or ''}".encode())
        os._exit(125)


def _become(
    plan: Mapping[str, Any], folder: str, readable: list[str], writable: list[str]
) -> NoReturn:
    """Bounds this process, layer by layer, and runs the program in it."""
    os.chdir(folder)
    namespaces.drop_rights(plan["user"])
    _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # lost with the user
    for name, bound in plan["rlimits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))
    if _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if plan["landlock"]:
        landlock.restrict([*readable, *plan["devices"]], writable)
    os.closerange(3, plan["status"])
    os.closerange(plan["status"] + 1, 4096)
    seccomp.install()
    os.write(plan["status"], b"ok")
    environment = {**plan["env"], "HOME": folder, "TMPDIR": folder}
    try:
        os.execve(plan["argv"][0], plan["argv"], environment)
    except OSError as error:
        print(f"{plan['argv'][0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


def _watch(child: int, proc: int, memory: int, processes: int) -> NoReturn:
    """Waits for the program; ends its group when it holds more than `memory` bytes together, or is
    more than twice `processes`, where the user is one whose processes the kernel does not count."""
    os.close(0)  # our end would keep the pipe open
    while True:
        woken = signal.sigtimedwait(_SIGNALS, _LOOK)
        ended, how = os.waitpid(child, os.WNOHANG)
        if ended:
            os._exit(_code(how))
        if woken is not None and woken.si_signo == signal.SIGTERM:
            os.killpg(0, signal.SIGKILL)
        held, count = _group(proc, os.getpgrp())
        if held > memory or count > 2 * processes:
            print("too much memory, or too many processes", file=sys.stderr, flush=True)
            os._exit(OVER)  # whoever waits for us kills the group


def _group(proc: int, group: int) -> tuple[int, int]:
    """Bytes of memory that the group's processes hold each for itself, and how many they are."""
    pages, count, me = 0, 0, os.getpid()
    for entry in os.listdir(proc):
        if not entry.isdigit() or int(entry) == me:
            continue
        try:
            if os.getpgid(int(entry)) == group:
                at = os.open(f"{entry}/statm", os.O_RDONLY, dir_fd=proc)
                _, resident, shared, *_ = os.read(at, 200).split()
                os.close(at)
                pages += int(resident) - int(shared)
                count += 1
        except OSError:
            continue  # it has ended
    return pages * resource.getpagesize(), count


def _reap_until(program: int) -> NoReturn:
    """The first process of a process namespace: when it ends, the kernel ends all the others."""
    while True:
        ended, how = os.wait()
        if ended == program:
            os._exit(_code(how))


def _code(how: int) -> int:
    return 128 + os.WTERMSIG(how) if os.WIFSIGNALED(how) else os.WEXITSTATUS(how)


if __name__ == "__main__":
    main()
