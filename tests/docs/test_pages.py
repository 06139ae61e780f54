"""What the pages name exists: commands with the options they are given, and names of the API."""

import importlib
import operator
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every call of jaxinfra in the text's shell blocks."""
    lines = "".join(_SHELL.findall(text)).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("jaxinfra ")]


def unknown(words: list[str]) -> list[str]:
    """Options of a call that its help does not have."""
    nested = words[1] in ("agent", "align", "kernels")
    name = words[1 : 3 if nested else 2]
    told = subprocess.run(
        [sys.executable, "-m", "jaxinfra", *name, "--help"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if told.returncode:
        return [" ".join(name)]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [option for option in options if option not in re.findall(r"--[a-z-]+", told.stdout)]


@pytest.mark.parametrize("page", ["projects"])
def test_commands_exist(page):
    found = commands((DOCS / f"{page}.md").read_text())
    assert len(found) > 5
    assert {" ".join(words): missing for words in found if (missing := unknown(words))} == {}


def test_what_does_not_exist_is_found():
    (words,) = commands("```sh\njaxinfra serve smollm2-135m --prot 8000  # a slip\n```\n")
    assert unknown(words) == ["--prot"]
    assert unknown(["jaxinfra", "srve"]) == ["srve"]


@pytest.mark.parametrize("page", sorted(DOCS.glob("api*.md")), ids=lambda page: page.stem)
def test_every_name_of_the_api_exists(page):
    named = re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)$", page.read_text(), re.MULTILINE)
    missing, module = [], None
    for kind, name in named:
        if kind == "currentmodule":
            module = importlib.import_module(name)
            continue
        try:
            operator.attrgetter(name)(module)
        except AttributeError:
            missing.append(f"{module.__name__}.{name}")
    assert named and missing == []
