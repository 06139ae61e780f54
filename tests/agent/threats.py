"""What a hostile program tries. Read from standard input by `python -I -S - '{"secret": ...}'`,
inside a sandbox and, as the control, outside. Prints {threat: what came of it}; "done" is success.

Standard library only. Each function tries one thing and returns something true if it worked.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import socket
import sys
import time

GIVEN = json.loads(sys.argv[1]) if __name__ == "__main__" else {}
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"


def syscall(x86, arm, *args):
    """The result; raises OSError as Python's own calls do."""
    found = libc.syscall(x86 if X86 else arm, *args)
    if found < 0:
        raise OSError(ctypes.get_errno(), "syscall")
    return found


def entered(x86, arm, *args):
    """Whether the kernel looked at the arguments: any error but a refusal of the whole call."""
    try:
        found = syscall(x86, arm, *args)
        if x86 in (298, 323, 425):  # they return descriptors
            os.close(found)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise
        if error.errno == errno.ENOSYS:
            raise LookupError("the kernel has no such call") from None
    return True


# Reading


def read_shadow():
    return open("/etc/shadow").read()


def read_ssh_key():
    return "canary" in open(GIVEN["folder"] + "/.ssh/id_rsa").read()


def read_project_env():
    return "canary" in open(GIVEN["folder"] + "/.env").read()


def read_environ_of_process_1():
    return open("/proc/1/environ").read()


def read_environ_of_others():
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/environ") as file:
                    if "CANARY=" in file.read():
                        return True
            except OSError:
                pass


def read_by_subclasses():
    for kind in ().__class__.__base__.__subclasses__():
        modules = getattr(getattr(kind.__init__, "__globals__", {}).get("sys"), "modules", {})
        if "os" in modules:
            read = modules["os"].open(GIVEN["folder"] + "/.env", 0)
            return modules["os"].read(read, 100)


def read_by_ctypes():
    opened = libc.open((GIVEN["folder"] + "/.env").encode(), 0)
    return opened >= 0


# Writing and escaping


def write_outside():
    return open(GIVEN["folder"] + "/written", "w").write("x")


def write_through_symlink():
    os.symlink(GIVEN["folder"] + "/target", "link")
    return open("link", "w").write("x")


def write_through_dots():
    return open("../" * 12 + GIVEN["folder"].lstrip("/") + "/dots", "w").write("x")


def hard_link_a_secret():
    os.link(GIVEN["folder"] + "/.env", GIVEN["scratch"] + "/hard")
    return open(GIVEN["scratch"] + "/hard").read()


def write_through_proc_root():
    return open("/proc/self/root" + GIVEN["folder"] + "/root", "w").write("x")


def use_an_inherited_descriptor():
    return os.read(GIVEN["descriptor"], 10)


def read_through_anothers_descriptor():
    return os.open(f"/proc/{GIVEN['holder']}/fd/{GIVEN['descriptor']}", os.O_RDONLY) >= 0


# Network


def tcp():
    socket.create_connection(("127.0.0.1", GIVEN["tcp"]), timeout=60).close()
    return True


def udp_and_dns():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(60)
    s.sendto(b"query", ("127.0.0.1", GIVEN["udp"]))
    return s.recv(10) == b"answer"


def unix_abstract():
    s = socket.socket(socket.AF_UNIX)
    s.connect("\0" + GIVEN["abstract"])
    return True


def netlink():
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)


def raw_socket():
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


def listen():
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    s.listen()
    return True


# Resources; the bounds of the test lie below what is tried


def fork_many():
    children = []
    try:
        for _ in range(60):
            pid = os.fork()
            if not pid:
                time.sleep(100)
                os._exit(0)
            children.append(pid)
        time.sleep(GIVEN.get("patience", 0))  # for who counts them only now and then
        return True
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def much_memory():
    return len(bytearray(400 << 20))


def much_memory_outside_of_limits():
    return os.memfd_create("held") >= 0


def fill_the_disk():
    os.makedirs(GIVEN["scratch"] + "/disk", exist_ok=True)
    for i in range(12):
        with open(f"{GIVEN['scratch']}/disk/{i}", "wb") as file:
            file.write(bytes(1 << 20))
    return True


def one_large_file():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return open(GIVEN["scratch"] + "/large", "wb").write(bytes(6 << 20))


def many_entries():
    os.makedirs(GIVEN["scratch"] + "/many", exist_ok=True)
    for i in range(400):
        open(f"{GIVEN['scratch']}/many/{i}", "w").close()
    return True


def many_descriptors():
    return [os.dup(1) for _ in range(100)]


def raise_own_limits():
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    return True


def change_limits_of_another():
    return resource.prlimit(GIVEN["pid"], resource.RLIMIT_CORE)


# Other processes


def signal_another():
    os.kill(GIVEN["pid"], 0)
    return True


def trace_another():
    return syscall(101, 117, 0x4206, GIVEN["pid"], 0, 0) == 0  # PTRACE_SEIZE; ends with us


def read_memory_of_another():
    return entered(310, 270, GIVEN["pid"], 0, 0, 0, 0, 0)


def leave_the_process_group():
    os.setsid()
    return True


def shared_memory():
    return open("/dev/shm/" + GIVEN["abstract"], "w").write("x")


def system_v_memory():
    return syscall(29, 194, 0, 4096, 0o1600) >= 0


def system_v_messages():
    return syscall(68, 186, 0, 0o1600) >= 0


def become_root():
    os.setuid(0)
    os.chown(GIVEN["scratch"], 1, 1)
    return True


def gain_rights_by_setuid_programs():
    return libc.prctl(39, 0, 0, 0, 0) == 0  # PR_GET_NO_NEW_PRIVS


def see_an_accelerator():
    return os.environ.get("CUDA_VISIBLE_DEVICES") != ""


# The kernel


def mount():
    return libc.mount(b"none", b"/mnt", b"tmpfs", 0, None) == 0 or _fail()


def unshare_mounts():
    return syscall(272, 97, 0x20000) == 0


def unshare_users():
    return syscall(272, 97, 0x10000000) == 0


def clone_users():
    child = syscall(56, 220, 0x10000000 | 17, 0, 0, 0, 0)
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return True


def enter_namespaces():
    with open("/proc/self/ns/mnt") as file:
        return entered(308, 268, file.fileno(), 0)


def chroot():
    os.chroot("/")
    return True


def bpf():
    return entered(321, 280, 0, 0, 0)


def io_uring():
    return entered(425, 425, 0, 0)


def perf():
    return entered(298, 241, 0, 0, -1, -1, 0)


def keys():
    return entered(250, 219, 0, -3, 0)


def userfaultfd():
    return entered(323, 282, 1)


def kernel_log():
    return entered(103, 116, 10, 0, 0)


def handles():
    return entered(304, 265, -1, 0, 0)


def type_into_the_terminal():
    return libc.ioctl(0, 0x5412, b"x") == 0 or ctypes.get_errno() == errno.ENOTTY or _fail()


def other_instruction_set():
    if not X86:
        raise LookupError("only x86_64 has x32")
    libc.syscall(0x40000000 + 39)
    return True


def _fail():
    raise OSError(ctypes.get_errno(), "refused")


def attempt(threat):
    """What came of it, tried in a child, as it may end whoever tries."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = "done" if threat() else "nothing"
        except LookupError as error:
            said = f"absent: {error}"
        except (OSError, MemoryError) as error:
            said = f"{type(error).__name__}: {error}"
        os.write(tell, said.encode()[:500])
        os._exit(0)
    os.close(tell)
    said = os.read(told, 600).decode()
    os.close(told)
    os.waitpid(child, 0)
    return said or "killed"


THREATS = {
    name: made
    for name, made in list(globals().items())
    if callable(made) and getattr(made, "__module__", None) == __name__
    and not name.startswith("_") and name not in ("syscall", "entered", "attempt")
}  # fmt: skip

if __name__ == "__main__":
    GIVEN.setdefault("scratch", os.environ.get("HOME", "."))
    print(json.dumps({name: attempt(THREATS[name]) for name in GIVEN["threats"]}))
