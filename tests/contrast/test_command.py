"""What is shown, the command, and the one error where PyTorch is missing."""

import importlib
import importlib.util

import pytest

import contrast
from contrast import commands, peer, show
from jaxinfra.errors import UserError


def test_every_contrast_has_a_claim_and_a_main():
    for name in contrast.NAMES:
        module = importlib.import_module(f"contrast.{name}")
        assert callable(module.main), name
        assert f"python -m contrast.{name}" in module.__doc__, name


def test_the_command_lists_all_and_refuses_others(capsys):
    commands.contrast(None)
    told = capsys.readouterr().out
    assert all(name in told for name in contrast.NAMES)
    with pytest.raises(UserError, match="there are capture"):
        commands.contrast("nothing")


def test_a_missing_torch_is_one_sentence_beside_the_other_side(monkeypatch, capsys):
    real = importlib.import_module

    def absent(name, *args):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name="torch")
        return real(name, *args)

    monkeypatch.setattr(peer.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install 'jaxinfra\[torch\]'"):
        peer.torch()
    found = show.side_by_side("A claim.", {"JAX": lambda: {"n": 1}, "PyTorch": peer.torch})
    told = capsys.readouterr().out
    assert found == {"JAX": {"n": 1}}
    assert "PyTorch: PyTorch is not installed: pip install 'jaxinfra[torch]'" in told


def test_a_broken_torch_is_not_called_missing(monkeypatch):
    def broken(name, *args):
        raise ModuleNotFoundError("No module named 'sympy'", name="sympy")

    monkeypatch.setattr(peer.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="sympy"):
        peer.torch()


def test_tables_align_numbers_to_the_right():
    text = show.table(["a", "value"], [["x", 12345], ["long name", True], ["y", 0.12345]])
    assert text.splitlines() == [
        "a          value",
        "---------  ------",
        "x          12,345",
        "long name  yes",
        "y           0.123",
    ]
