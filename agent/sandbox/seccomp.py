"""A seccomp filter: a list of system calls that fail with EPERM, as classic BPF.

It refuses what the other layers do not bound: new sockets, leaving the process group, watching
other processes, new namespaces, the kernel's large and young interfaces. A call through another
instruction set (32-bit, x32) kills the process: the numbers would mean other calls.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET,TIME}
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # write into the terminal that we were started from
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

# From the kernel's tables. name: (x86_64, aarch64); None where the machine has no such call.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "clone": (56, 220), "setpgid": (109, 154), "setsid": (112, 157),
    "ioctl": (16, 29), "prlimit64": (302, 261), "setpriority": (141, 140), "ptrace": (101, 117),
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "unshare": (272, 97), "setns": (308, 268),
    "clone3": (435, 435), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "quotactl": (179, 60), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "reboot": (169, 142), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "vmsplice": (278, 75), "fanotify_init": (300, 262),
    "memfd_secret": (447, 447), "personality": (135, 92),
}  # fmt: skip


def supported() -> str | None:
    """Why this machine has no filter, or None."""
    machine = platform.machine()
    return None if machine in _MACHINES else f"no table of system calls for {machine}"


def program() -> bytes:
    """The filter: an array of struct sock_filter {u16 code; u8 jt; u8 jf; u32 k}."""
    column, arch = _MACHINES[platform.machine()]
    refuse, absent = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    code = [
        (_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL),
    ]  # fmt: skip
    for name, numbers in NUMBERS.items():
        number = numbers[column]
        if number is None:
            continue
        if name == "clone":  # threads and forks are clones too: refuse by the flags
            code += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, _ARGUMENT),
                     (_ANY_BIT, 0, 1, _NEW_NAMESPACES), (_RETURN, 0, 0, refuse),
                     (_RETURN, 0, 0, _ALLOW)]  # fmt: skip
        elif name == "ioctl":
            code += [(_EQUAL, 0, 5, number), (_LOAD, 0, 0, _ARGUMENT + 8),
                     (_EQUAL, 1, 0, _TIOCSTI), (_EQUAL, 0, 1, _TIOCLINUX),
                     (_RETURN, 0, 0, refuse), (_RETURN, 0, 0, _ALLOW)]  # fmt: skip
        elif name == "prlimit64":  # of itself (0) only
            code += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, _ARGUMENT), (_EQUAL, 0, 1, 0),
                     (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, refuse)]  # fmt: skip
        else:  # its flags lie in memory, where a filter cannot look: libc falls back to clone
            code += [(_EQUAL, 0, 1, number),
                     (_RETURN, 0, 0, absent if name == "clone3" else refuse)]  # fmt: skip
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def install() -> None:
    """Puts the filter on this process and all that it will start; needs no_new_privs."""
    libc = ctypes.CDLL(None, use_errno=True)
    filter = program()
    held = ctypes.create_string_buffer(filter, len(filter))
    fprog = struct.pack("=HxxxxxxQ", len(filter) // 8, ctypes.addressof(held))
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, fprog, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
