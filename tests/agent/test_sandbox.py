"""The sandbox: each threat fails inside and, as the control, succeeds outside."""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import anyio
import pytest

import agent.sandbox as sandbox_module
from agent.execute import execute
from agent.messages import ToolCall
from agent.processes import Finished
from agent.sandbox import PYTHON, Bounds, Sandbox, _unavailable
from agent.sandbox.tools import python_tool, shell_tool
from agent.tools import Context
from jaxinfra.errors import UserError
from tests.agent.threats import THREATS

SCRIPT = Path(__file__).with_name("threats.py").read_bytes()
SMALL = Bounds(seconds=200, cpu_seconds=100, memory=200 << 20, processes=24, open_files=48,
               file_bytes=4 << 20, disk_bytes=8 << 20, entries=256)  # fmt: skip
LEVELS = ["landlock", "namespaces"]
# What a level does not bound, and says so in `Level.open`.
OPEN = {"namespaces": set(), "landlock": {"fill_the_disk", "many_entries"}}


def run(box: Sandbox, argv: list[str], **options) -> Finished:
    return anyio.run(functools.partial(box.run, argv, **options))


def python(box: Sandbox, code: str) -> Finished:
    return run(box, [PYTHON, "-I", "-S", "-"], stdin=code.encode())


def obtained(level: str) -> str:
    if reason := _unavailable(level):  # pyright: ignore
        pytest.skip(f"this kernel gives no {level}: {reason}")
    return level


@contextlib.contextmanager
def bait(folder: Path):
    """Secrets, listeners and a process to be attacked; yields what the threats are told."""
    (folder / ".ssh").mkdir()
    (folder / ".ssh" / "id_rsa").write_text("canary")
    (folder / ".env").write_text("canary")
    name = f"bait-{os.getpid()}"
    tcp, udp, abstract = (socket.socket(), socket.socket(type=socket.SOCK_DGRAM),
                          socket.socket(socket.AF_UNIX))  # fmt: skip
    victim = subprocess.Popen(["/bin/sleep", "600"], env={"CANARY": "1"})
    secret = open(folder / ".env")  # noqa: SIM115 - closed below, with the sockets
    os.set_inheritable(secret.fileno(), True)

    def answer() -> None:
        with contextlib.suppress(OSError, TypeError):
            while True:
                udp.sendto(b"answer", udp.recvfrom(100)[1])

    with tcp, udp, abstract, secret:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        abstract.bind("\0" + name)
        abstract.listen()
        threading.Thread(target=answer, daemon=True).start()
        try:
            yield {
                "folder": str(folder), "pid": victim.pid, "holder": os.getpid(),
                "descriptor": secret.fileno(),
                "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "abstract": name,
                "threats": sorted(THREATS),
            }  # fmt: skip
        finally:
            with contextlib.suppress(OSError):
                udp.shutdown(socket.SHUT_RDWR)
            victim.kill()
            victim.wait()
            Path("/dev/shm", name).unlink(missing_ok=True)


def try_inside(level: str, folder: Path) -> dict[str, str]:
    box = Sandbox(SMALL, level=level)  # pyright: ignore
    with bait(folder) as given:
        bomb = {**given, "threats": ["fork_many"], "patience": 60}
        given["threats"].remove("fork_many")
        ended = run(box, [PYTHON, "-I", "-S", "-", json.dumps(given)], stdin=SCRIPT)
        forks = run(box, [PYTHON, "-I", "-S", "-", json.dumps(bomb)], stdin=SCRIPT)
    assert ended.code == 0, ended.stderr.decode()[-600:]
    # Where the kernel does not count the user's processes the watch ends the whole box.
    bombed = {"fork_many": "killed"} if forks.code == 124 else json.loads(forks.stdout)
    return json.loads(ended.stdout) | bombed


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("outside")
    with bait(folder) as given:
        given["scratch"] = str(folder)
        done = subprocess.run(
            [PYTHON, "-I", "-S", "-", json.dumps(given)], input=SCRIPT, capture_output=True,
            cwd=folder, close_fds=False, timeout=600, start_new_session=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-600:]
    return json.loads(done.stdout)


def open_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """One that the permissions of files would let anybody write, so that they prove nothing."""
    folder = factory.mktemp(name)
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory):
    return functools.cache(lambda level: try_inside(level, open_folder(tmp_path_factory, level)))


@pytest.mark.parametrize("level", LEVELS)
def test_what_lies_in_tmp_can_be_read_and_tmp_be_written(level):
    """As where an environment's folder is there: a home below /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "told").write_text("here")
        box = Sandbox(level=obtained(level), readable=(folder,))  # pyright: ignore
        code = f"print(open('{folder}/told').read())\nopen('{folder}/new', 'w')"
        ended = python(box, code)
        assert ended.stdout.strip() == b"here" and ended.code != 0
        assert not (Path(folder) / "new").exists()
        if level == "namespaces":
            ended = python(box, "open('/tmp/a', 'w').write('1'); print(open('/tmp/a').read())")
            assert ended.stdout.strip() == b"1", ended.stderr


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threat", sorted(THREATS))
def test_a_threat_fails_inside_and_succeeds_outside(threat, level, inside, outside):
    obtained(level)
    if threat in OPEN[level]:
        box = Sandbox(SMALL, level=level).describe()
        assert any("work folder" in told for told in box.open)
        return
    assert inside(level)[threat] != "done"
    if outside[threat] != "done":
        pytest.skip(f"not to be had outside either here: {outside[threat]}")


def test_most_controls_succeed(outside):
    """A list of threats that fail everywhere would prove nothing."""
    failed = {name: said for name, said in outside.items() if said != "done"}
    lawful = ("absent", "PermissionError", "FileNotFoundError: [Errno 2]")
    assert all(said.startswith(lawful) for said in failed.values()), failed
    assert len(failed) <= (2 if os.geteuid() == 0 else 16), failed


AS_NOBODY = """
import json, os, pathlib, sys
sys.path[:] = json.loads(sys.argv[1])
import agent.sandbox as sandbox
from tests.agent import test_sandbox
test_sandbox.run(sandbox.Sandbox(), ["/bin/true"])  # imports what nobody may read
sandbox._unavailable.cache_clear()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sandbox.PYTHON = test_sandbox.PYTHON = sys.argv[4]
sandbox._LAUNCHER = sys.argv[3] + "/launcher/launcher.py"
if reason := sandbox._unavailable(sys.argv[2]):
    sys.exit("absent: " + reason)
print(json.dumps(test_sandbox.try_inside(sys.argv[2], pathlib.Path(sys.argv[3]))))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this is a plain user: the tests above are this one")
@pytest.mark.parametrize("level", LEVELS)
def test_threats_fail_for_a_plain_user_too(level):
    pythons = [p for p in (PYTHON, "/usr/bin/python3") if sandbox_module._open_to_others(p)]
    if not (found := [p for p in pythons if os.path.exists(p)]):
        pytest.skip("no Python here that another user may run")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        shutil.copytree(Path(sandbox_module.__file__).parent, folder + "/launcher")
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, json.dumps(sys.path), level, folder, found[0]],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    if done.stderr.startswith("absent"):
        pytest.skip(f"a plain user gets no {level} here: {done.stderr[8:]}")
    assert done.returncode == 0, done.stderr[-800:]
    succeeded = {name for name, said in json.loads(done.stdout).items() if said == "done"}
    assert succeeded <= OPEN[level]


@pytest.mark.parametrize("level", LEVELS)
def test_work_gets_done_inside(level, tmp_path):
    box = Sandbox(level=obtained(level))  # pyright: ignore
    ended = python(box, "open('f', 'w').write('x'); print(sum(range(10)), open('f').read())")
    assert (ended.code, ended.stdout, ended.ended_by) == (0, b"45 x\n", None)
    assert run(box, ["/bin/sh", "-c", "exit 7"]).code == 7
    assert run(box, ["/bin/sh", "-c", "kill -9 $$"]).code == 128 + 9
    assert run(box, ["/bin/sh", "-c", "echo $A"], env={"A": "b"}).stdout == b"b\n"
    assert run(box, ["/nowhere/program"]).code == 127
    kept = Sandbox(level=level, work=str(tmp_path))  # pyright: ignore
    python(kept, "open('kept', 'w').write('1')")
    assert python(kept, "print(open('kept').read())").stdout == b"1\n"
    assert (tmp_path / "kept").read_text() == "1"


@pytest.mark.parametrize("level", LEVELS)
def test_bounds_end_what_does_not_end(level):
    stubborn = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]\nwhile 1: pass"
    box = Sandbox(Bounds(seconds=0.6), level=obtained(level))  # pyright: ignore
    assert python(box, stubborn).ended_by == "time"
    box = Sandbox(Bounds(seconds=200, cpu_seconds=100, output=1000), level=obtained(level))  # pyright: ignore
    flood = python(box, "while 1: print('x' * 1000)")
    assert flood.ended_by == "output" and len(flood.stdout) <= 1000
    together = (
        "import os, time\n[os.fork() for _ in range(3)]\nx = bytearray(80 << 20)\ntime.sleep(300)"
    )
    small = Sandbox(Bounds(seconds=200, memory=200 << 20), level=level)  # pyright: ignore
    ended = python(small, together)
    assert ended.ended_by is None and ended.code == 124 and b"too much memory" in ended.stderr


DAEMON = """
import os, sys, time
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass
    if os.fork() == 0:
        os.close(0), os.close(1), os.close(2)
        time.sleep(300)
"""


def alive(tag: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and tag.encode() in Path("/proc", entry, "cmdline").read_bytes():
                found.append(int(entry))
    return found


def comes(what):
    """Whether it is so within two minutes, less than what is looked for would live by itself."""
    deadline = time.monotonic() + 120
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_survives_the_box_but_does_outside(level):
    outside, inside = (f"{where}-{os.getpid()}-{level}" for where in ("outside", "inside"))
    subprocess.run([PYTHON, "-I", "-S", "-c", DAEMON, outside], timeout=200)
    survivors = comes(lambda: alive(outside))
    while pids := alive(outside):  # one may be about to fork
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
    assert survivors
    argv = [PYTHON, "-I", "-S", "-c", DAEMON, inside]
    assert run(Sandbox(level=obtained(level)), argv).code == 0  # pyright: ignore
    assert comes(lambda: not alive(inside))


@pytest.mark.parametrize("begun", ["", "-program"])  # only the caller, or what it started too
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_survives_a_caller_that_is_killed(level, begun):
    tag = f"orphan-{os.getpid()}-{level}-{begun}"
    code = (
        "import sys, anyio; sys.path[:] = eval(sys.argv[1])\n"
        "from agent.sandbox import Sandbox\n"
        "program = ['/bin/sh', '-c', 'sleep 300; :', sys.argv[3] + '-program']\n"
        "anyio.run(Sandbox(level=sys.argv[2]).run, program)"
    )
    caller = subprocess.Popen([sys.executable, "-c", code, repr(sys.path), obtained(level), tag])
    seen = comes(lambda: alive(tag + begun))
    caller.kill()
    caller.wait()
    assert seen and comes(lambda: not alive(tag))


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_tried_in_a_group_of_its_own(level, monkeypatch):
    """The launcher bounds its whole group: in ours, a large caller would seem to be too large."""
    name, groups, real = obtained(level), [], subprocess.run

    def run(*args, **options):
        groups.append(options.get("start_new_session"))
        return real(*args, **options)

    monkeypatch.setattr(sandbox_module.subprocess, "run", run)
    assert sandbox_module._unavailable.__wrapped__(name) is None
    assert groups == [True]


def test_refuses_rather_than_run_without(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox_module, "_unavailable", lambda name: "not here")
    ran = tmp_path / "ran"
    with pytest.raises(UserError, match=r"refused.*namespaces: not here.*landlock: not here"):
        run(Sandbox(), ["/bin/sh", "-c", f"touch {ran}"])
    assert not ran.exists()
    with pytest.raises(UserError, match="refused"):
        python_tool()


def test_says_what_it_obtained():
    level = Sandbox().describe()
    assert "seccomp" in level.layers and "rlimits" in level.layers
    with pytest.raises(UserError, match="whole path"):
        run(Sandbox(), ["sh"])


def test_tools_tell_results_as_text(tmp_path):
    async def end(made, **arguments):
        async def emit(event):
            pass

        return await execute(made, ToolCall("c", made.name, json.dumps(arguments)), Context(), emit)

    async def main():
        made, shell = python_tool(), shell_tool()
        assert made.effects == "pure" and not made.privileged
        assert python_tool(Sandbox(work=str(tmp_path))).effects == "write"
        assert (await end(made, code="print(6 * 7)")).content == "42\n"
        hostile = "print('\\x1b]0;title\\x07\\x1b[2Jred'); print('{\"a\":' * 2000)"
        told = await end(made, code=hostile)
        assert told.error is None and "\x1b" not in told.content and "red" in told.content
        # A result is text and never loaded, so a pickle in it stays bytes.
        pickled = "import pickle, sys, os\nclass A:\n  def __reduce__(self): return os.getpid, ()\n"
        told = await end(made, code=pickled + "sys.stdout.buffer.write(pickle.dumps(A()))")
        assert "getpid" in told.content
        failed = await end(made, code="1 / 0")
        assert failed.error == "failed" and "ZeroDivisionError" in failed.content
        assert "absent" in (await end(shell, command="ls /etc/passwd || echo absent")).content

    anyio.run(main)
