"""Inspect finds our sandbox by its entry point and holds it to its own checks of a provider."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.evaluate.environment import environment
from agent.sandbox import Sandbox
from jaxinfra.errors import UserError

ROOT = Path(__file__).parents[2]
# What Inspect checks and we do not give: other users, and the host's list of them to look at.
KNOWN = {"test_exec_as_user", "test_exec_permission_error"}


def no_namespaces() -> str | None:
    try:
        Sandbox(level="namespaces").describe()
    except UserError as error:
        return str(error)


@pytest.mark.frameworks
@pytest.mark.slow
@pytest.mark.timeout(2400)  # installing Inspect is most of it
@pytest.mark.skipif(bool(no_namespaces()), reason=f"{no_namespaces()}")
def test_inspects_own_checks_and_a_task_in_our_sandbox(tmp_path):
    needs = ("inspect-ai==0.3.285", "stamina>=25.2", "docstring_parser>=0.17", "anyio>=4.12")
    python = environment("inspect", needs)
    # This checkout by its metadata, for the entry point; jax and the like stay out.
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "-e",
         str(ROOT)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr[-2000:]
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    secret.chmod(0o666)
    script = Path(__file__).with_name("inspect_checks.py")
    done = subprocess.run(
        [python, script, secret, tmp_path / "logs"], capture_output=True, text=True, timeout=600,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    failed = {name: why for name, why in told["checks"].items() if why}
    assert set(failed) == KNOWN and len(told["checks"]) >= 44, failed
    assert "hidden" not in str(told["escapes"]) and secret.read_text() == "hidden"
    assert told["task"]["status"] == "success" and "42" in told["task"]["results"], told["task"]
