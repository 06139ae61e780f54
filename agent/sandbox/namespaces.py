"""A process tree with a file system, processes and a network of its own, as bubblewrap makes one.

Rights are used only to build it: as root ours, which are dropped with the user before the program
starts; as anybody else those of a user namespace, which reach nothing outside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
_NEWPID, _NEWNET, _NEWCGROUP = 0x20000000, 0x40000000, 0x2000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC = 1, 2, 4, 8, 32, 4096, 16384
_PRIVATE, _DETACH = 1 << 18, 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEVICES = ("null", "zero", "full", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()),
        f"mount {kind or source} on {target}",
    )


def unshare() -> None:
    """New namespaces of every kind for what this process starts. Raises OSError where the kernel,
    or the container, does not let us."""
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | _NEWCGROUP
    if os.geteuid() == 0:
        _check(_libc.unshare(flags), "unshare")
        return
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(flags | _NEWUSER), "unshare")
    for name, line in (
        ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"),
    ):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def build_root(readable: list[str], work: str | None, size: int, files: int) -> None:
    """Makes a root of its own from `readable`, bound read-only at their own paths, and /box: the
    folder `work`, or an empty one of at most `size` bytes and `files` entries in memory. /tmp is
    the same or, where what is readable lies in it, another such one. Needs `unshare` before it and
    this process to be the first of its process namespace."""
    _mount("none", "/", "", _REC | _PRIVATE)
    base = "/tmp"
    _mount("tmpfs", base, "tmpfs", _NOSUID | _NODEV, "mode=0755,size=16m,nr_inodes=4096")
    os.chdir(base)
    os.mkdir("old")
    os.mkdir("new")
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"old"), "pivot_root")
    os.chdir("/")
    _mount("new", "/new", "", _BIND | _REC)  # a mount point, to become the root
    in_memory = f"mode=0777,size={size},nr_inodes={files}"
    if any(path.startswith("/tmp/") for path in readable):
        os.mkdir("/new/tmp")
        _mount("tmpfs", "/new/tmp", "tmpfs", _NOSUID | _NODEV, in_memory)
    for path in readable:
        source = f"/old{path}"
        if os.path.islink(source):
            os.makedirs(os.path.dirname(f"/new{path}"), exist_ok=True)
            os.symlink(os.readlink(source), f"/new{path}")
        elif os.path.exists(source):
            _bind(source, f"/new{path}", _RDONLY | _NODEV)
    os.makedirs("/new/dev", exist_ok=True)
    for name in _DEVICES:
        _bind(f"/old/dev/{name}", f"/new/dev/{name}", _NOEXEC)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"),
                         ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):  # fmt: skip
        os.symlink(target, f"/new/dev/{name}")
    os.makedirs("/new/proc", exist_ok=True)
    with contextlib.suppress(OSError):  # in some containers: no /proc, which is less, not more
        _mount("proc", "/new/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    os.makedirs("/new/box", exist_ok=True)
    if work is None:
        _mount("tmpfs", "/new/box", "tmpfs", _NOSUID | _NODEV, in_memory)
    else:
        _bind(f"/old{work}", "/new/box", _NODEV)
    if not os.path.exists("/new/tmp"):
        os.symlink("/box", "/new/tmp")
    _check(_libc.umount2(b"/old", _DETACH), "umount2")
    os.chdir("/new")
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount2")
    os.chdir("/")
    _mount("none", "/", "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _bind(source: str, target: str, flags: int) -> None:
    if stat.S_ISDIR(os.stat(source).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    _mount(source, target, "", _BIND)
    # A user namespace may not drop flags that the mount has outside.
    held = os.statvfs(source).f_flag & (_RDONLY | _NOSUID | _NODEV | _NOEXEC)
    _mount("none", target, "", _REMOUNT | _BIND | _NOSUID | flags | held)


def drop_rights(user: int | None) -> None:
    """Gives up every right of root: the capabilities, the groups, and where it is not None the
    user, to become `user`."""
    for capability in range(64):
        if _libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP; fails beyond the last one
            break
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(_libc.syscall({"x86_64": 126, "aarch64": 91}[os.uname().machine], header,
                         (ctypes.c_uint32 * 6)()), "capset")  # fmt: skip
