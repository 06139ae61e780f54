"""Tools: the schema is the signature's, arguments are checked, whatever fails is an observation."""

import dataclasses
import datetime
import enum
import json
import os
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from agent.execute import clean, execute
from agent.messages import ToolCall
from agent.tools import ArgumentError, Context, ToolFailed, tool
from jaxinfra.errors import UserError
from tests.agent import sample_tools


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: float
    y: float


def run(made, arguments: Any = None, emitted: list | None = None):
    """The end of one call; `arguments` is JSON text or a value."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})

    async def main():
        async def emit(event):
            if emitted is not None:
                emitted.append(event)

        return await execute(made, ToolCall("c", made.name, text), Context(key="k"), emit)

    return anyio.run(main)


def test_schema_from_hints_docstring_and_annotated():
    @tool
    async def plan(
        ctx: Context,
        city: Annotated[str, "a town"],
        colour: Colour,
        where: list[Point],
        mode: Literal["fast", "slow"] = "fast",
        days: Annotated[int, Field(ge=1)] = 1,
        when: datetime.date | None = None,
    ) -> str:
        """Plans a trip.

        Args:
          mode: how to travel.
        """
        return f"{ctx.key} {city} {colour.name} {where[0].x} {mode} {days} {when!r}"

    schema = dict(plan.spec.parameters)
    assert plan.spec.description == "Plans a trip."
    assert schema["required"] == ["city", "colour", "where"]
    assert schema["additionalProperties"] is False
    assert "ctx" not in schema["properties"]
    assert schema["properties"]["city"] == {"type": "string", "description": "a town"}
    assert schema["properties"]["mode"]["description"] == "how to travel."
    assert schema["properties"]["days"]["minimum"] == 1
    assert "title" not in json.dumps(schema)
    ended = run(plan, {"city": "Oslo", "colour": "red", "where": [{"x": 1, "y": 2}],
                       "when": "2026-01-02"})  # fmt: skip
    assert ended.error is None
    assert ended.content == "k Oslo RED 1.0 fast 1 datetime.date(2026, 1, 2)"


def test_a_parameter_called_title_keeps_its_name():
    @tool
    def name(title: str) -> str:
        return title

    assert set(name.spec.parameters["properties"]) == {"title"}


async def _async(n: int) -> list[int]:
    return [n]


def _sync(n: int) -> list[int]:
    return [n]


def _sync_parts(n: int):
    yield "a"
    yield [n]


async def _async_parts(n: int):
    yield "a"
    yield [n]


@pytest.mark.parametrize("function", [_async, _async_parts, _sync, _sync_parts])
def test_every_kind_of_function(function):
    seen: list = []
    ended = run(tool(function), {"n": 3}, seen)
    parts = "parts" in function.__name__
    assert ended.content == ("a[3]" if parts else "[3]") and ended.error is None
    assert [event.text for event in seen] == (["a", "[3]"] if parts else [])


@pytest.mark.parametrize(
    "arguments",
    ['{"n": ', "[]", '{"n": "x"}', "{}", '{"n": 1, "m": 2}', "[" * 100_000, '{"n": NaN}'],
)
def test_wrong_arguments_are_told_and_nothing_runs(arguments):
    ran = []

    @tool
    def once(n: int) -> str:
        ran.append(n)
        return "ran"

    ended = run(once, arguments)
    assert ended.error == "arguments" and ended.content.startswith("error: arguments of once")
    assert len(ended.content) < 1000 and not ran
    assert run(once, {"n": 1}).content == "ran" and ran == [1]


def test_broken_definitions_name_the_fix():
    def unannotated(a):
        pass

    def many(*a: int):
        pass

    def unschemable(a: threading.Event):
        pass

    def late(a: int, ctx: Context):
        pass

    for function, words in [
        (unannotated, "parameter a needs a type annotation"),
        (many, "no name a model could use"),
        (unschemable, "core schema|Unable to generate"),
        (late, "first parameter"),
    ]:
        with pytest.raises(UserError, match=words):
            tool(function)
    with pytest.raises(UserError, match="letters, digits"):
        tool(name="a b")(_sync)
    with pytest.raises(UserError, match="not retried"):
        tool(retries=2)(_sync)
    with pytest.raises(UserError, match="top of a module"):
        tool(timeout=1.0, name="x")(lambda: 1)


def test_failures_are_observations():
    cyclic: list = []
    cyclic.append(cyclic)

    @tool
    def fail(how: str) -> Any:
        if how == "cyclic":
            return cyclic
        if how == "failed":
            raise ToolFailed("no such town")
        if how == "object":
            return object()
        raise RuntimeError("boom")

    kinds = {how: run(fail, {"how": how}) for how in ("cyclic", "failed", "object", "raise")}
    assert {how: ended.error for how, ended in kinds.items()} == {
        "cyclic": "failed", "failed": "failed", "object": "failed", "raise": "exception",
    }  # fmt: skip
    assert kinds["failed"].content == "error: no such town"
    assert kinds["raise"].content == "error: RuntimeError: boom"


def test_retries_only_what_may_pass_and_says_so():
    tries = []

    @tool(effects="pure", retries=2)
    async def flaky(kind: str) -> str:
        tries.append(kind)
        if kind == "wrong":
            raise ValueError("never right")
        if len(tries) < 3:
            raise ConnectionError("later")
        return "at last"

    seen: list = []
    assert run(flaky, {"kind": "weak"}, seen).content == "at last"
    assert [event.attempt for event in seen] == [1, 2]
    tries.clear()
    assert run(flaky, {"kind": "wrong"}).error == "exception" and len(tries) == 1


def test_results_are_capped_and_harmless_to_terminals():
    @tool(max_result=1000)
    def flood(n: int) -> str:
        return "\x1b[31mred\x1b]0;title\x07" + "x" * n + "end\ud800"

    ended = run(flood, {"n": 100_000_000})
    assert len(ended.content) < 1100 and ended.content.startswith("redxxx")
    assert "characters left out" in ended.content and ended.content.endswith("end?")


@given(st.text(), st.integers(0, 200))
def test_clean_leaves_no_control_and_obeys_its_bound(text, most):
    cleaned = clean(text, most)
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in cleaned)
    assert len(cleaned) <= most + 80
    if len(text) <= most and text.isascii() and text.isprintable():
        assert cleaned == text


def test_a_process_tool_returns_its_result_and_its_errors():
    assert run(sample_tools.add, {"a": 2, "b": 3}).content == "5"
    ended = run(sample_tools.crash)
    assert ended.error == "failed" and "status 3" in ended.content
    assert run(sample_tools.refuse).content == "error: not today"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_time_kills_what_ignores_sigterm_and_its_children(tmp_path):
    file, stubborn, pids = tmp_path / "pids", sample_tools.stubborn, []
    while len(pids) < 2:  # on a slow machine its time may be over before it has begun
        assert stubborn.timeout < 200
        ended = run(stubborn, {"pid_file": str(file)})
        assert ended.error == "timeout"
        pids = [int(pid) for pid in file.read_text().split()] if file.exists() else []
        stubborn = dataclasses.replace(stubborn, timeout=4 * stubborn.timeout)
    assert os.getpid() not in pids
    deadline = time.monotonic() + 120
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in pids)


def test_an_async_tool_is_cancelled_at_its_time():
    ended_by = []

    @tool(timeout=0.05)
    async def slow() -> str:
        try:
            await anyio.sleep(30)
        finally:
            ended_by.append("cancelled")
        return "late"

    assert run(slow).error == "timeout" and ended_by == ["cancelled"]


def test_parse_raises_what_a_model_can_read():
    with pytest.raises(ArgumentError, match=r"n: Input should be a valid integer"):
        tool(_sync).parse('{"n": "many"}')
