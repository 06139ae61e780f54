"""Landlock: this process and its children may touch only the paths that are given, even as root."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every machine
_READ = 1 | 4 | 8  # execute, read a file, read a folder
_FILE_ONLY = 1 | 2 | 4 | (1 << 14) | (1 << 15)  # the rights that a file, not a folder, can have
# Rights by the version that brought them: 13 at first, then refer, truncate, ioctl of devices.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}


def version() -> int:
    """The kernel's version of the interface; 0 where there is none."""
    found = ctypes.CDLL(None, use_errno=True).syscall(_CREATE, None, 0, 1)
    return max(0, found)


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Allows reading and running below `readable`, everything below `writable`, no TCP, no signal
    to and no abstract socket of a process outside. Needs no_new_privs; lasts for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    known = version()
    rights = (1 << _RIGHTS.get(known, 16)) - 1
    attributes = struct.pack("<QQQ", rights, 3 if known >= 4 else 0, 3 if known >= 6 else 0)
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    ruleset = libc.syscall(_CREATE, attributes, size, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for paths, allowed in ((readable, _READ), (writable, rights)):
        for path in paths:
            try:
                at = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            access = allowed & rights if os.path.isdir(path) else allowed & rights & _FILE_ONLY
            if libc.syscall(_ADD, ruleset, 1, struct.pack("<Qi", access, at), 0):
                raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
            os.close(at)
    if libc.syscall(_RESTRICT, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)
