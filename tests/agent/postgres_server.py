"""A PostgreSQL server of its own, in a temporary folder, reached by a socket in it."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


def binaries() -> Path | None:
    """The folder of initdb and postgres, which Debian leaves out of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    return next((p for p in [*places, *([Path(found).parent] if found else [])]
                 if (p / "initdb").is_file() and (p / "postgres").is_file()), None)  # fmt: skip


def _plain_user() -> dict:
    """The server refuses to run as root."""
    if os.geteuid():
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Starts a server, gives its address, and ends it."""
    where, plain = binaries(), _plain_user()
    assert where is not None
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        if plain:
            os.chown(folder, plain["user"], plain["group"])
        data, env = f"{folder}/data", {"PATH": "/usr/bin:/bin", "HOME": folder, "LC_ALL": "C"}
        made = subprocess.run(
            [where / "initdb", "-D", data, "-U", "tester", "-A", "trust", "-N", "-E", "UTF8"],
            env=env, cwd=folder, capture_output=True, text=True, **plain,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        with open(f"{folder}/log", "wb") as log:
            server = subprocess.Popen(
                [where / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses="],
                env=env, cwd=folder, stdout=log, stderr=log, **plain,
            )  # fmt: skip
            try:
                ready = [where / "pg_isready", "-q", "-h", folder]
                for _ in range(2000):
                    if subprocess.run(ready, env=env).returncode == 0:
                        break
                    assert server.poll() is None, Path(f"{folder}/log").read_text()
                    time.sleep(0.05)
                yield f"postgresql://tester:hidden-word@/postgres?host={folder}"
            finally:
                server.send_signal(signal.SIGINT)  # ends its clients' connections too
                try:
                    server.wait(10)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()
