"""The shell: it starts without jax, names what it does not know, and shows users no traceback."""

import importlib.metadata
import os
import subprocess
import sys
import types

import pytest

from jaxinfra import cli
from jaxinfra.errors import UserError

COMMANDS = {ep.name: ep for ep in importlib.metadata.entry_points(group=cli.GROUP)}


def run(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxinfra", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_help_lists_every_command_with_its_summary(capsys):
    cli.main(["--help"])
    shown = capsys.readouterr().out
    for name, entry_point in COMMANDS.items():
        summary = entry_point.load().__doc__.partition("\n")[0]
        assert summary and f"{name} " in shown and summary in shown


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["pull", "--help"]])
def test_starting_imports_no_jax(argv):
    code = (
        "import sys\nfrom jaxinfra import cli\n"
        f"try:\n    cli.main({argv})\nexcept SystemExit:\n    pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_unknown_command():
    done = run("trian")
    assert done.returncode == 2 and "no command 'trian'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pull", "no/such/folder/x"], "no/such/folder/x"),
        (["pull", "smollm3-9t", "--offline"], "smollm3-9t"),
        (["roofline", "no-such-model"], "no-such-model"),
        (["roofline", "qwen3-0.6b", "--chip", "abacus"], "abacus"),
        (["generate", "/no/such/model", "Hi"], "/no/such/model"),
        (["train", "--data", "/no/such/file"], "/no/such/file"),
        (["train", "--steps", "0"], "steps=0"),
        (["roofline", "tiny", "--phases"], "no phases"),
        (["roofline", "x" * 300], "x" * 300),
        (["tour", "--quick", "--only", "machine", "--out", "."], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("wanted", ["cuda", "tpu"])
def test_a_device_that_is_not_here(wanted):
    env = {**os.environ, "JAX_PLATFORMS": wanted}
    command = [sys.executable, "-m", "jaxinfra", "roofline", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"JAX_PLATFORMS={wanted}: jax finds no such device" in done.stderr


def only_command(monkeypatch, error: Exception) -> None:
    """Makes `anything` the only command, one that raises `error`."""

    class EntryPoint:
        name = "anything"

        @staticmethod
        def load():
            def broken() -> None:
                raise error

            return broken

    metadata = types.SimpleNamespace(entry_points=lambda group: [EntryPoint()])
    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(metadata=metadata))


def test_a_bug_keeps_its_traceback(monkeypatch):
    only_command(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["anything"])


def test_the_operating_system_s_errors_name_the_file(monkeypatch, capsys):
    only_command(monkeypatch, PermissionError(13, "Permission denied", "/some/file"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["anything"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "jaxinfra: /some/file: Permission denied\n"


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
