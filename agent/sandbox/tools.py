"""Tools that run what a model wrote, in a sandbox: Python, and a shell.

    agent = Agent("analyst", model, tools=(python_tool(), shell_tool()))

A box is thrown away after each call, so a call has no effect but its text. With `Sandbox(work=...)`
the folder is kept, and the calls are writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from agent.sandbox import PYTHON, Sandbox
from agent.tools import Tool, ToolFailed, tool


def python_tool(sandbox: Sandbox | None = None) -> Tool:
    """A tool `python(code)`; the model sees what the code prints. Raises UserError where there is
    no sandbox to be had."""
    box = sandbox or Sandbox()

    async def python(code: Annotated[str, "a whole program that prints its answer"]) -> str:
        """Runs Python with its standard library, without files or network, and returns what it
        prints."""
        return await _run(box, [PYTHON, "-I", "-S", "-"], code)

    return _tool(box, python)


def shell_tool(sandbox: Sandbox | None = None) -> Tool:
    """A tool `shell(command)`; see `python_tool`."""
    box = sandbox or Sandbox()

    async def shell(command: Annotated[str, "for /bin/sh"]) -> str:
        """Runs a command in an empty folder without network and returns what it prints."""
        return await _run(box, ["/bin/sh", "-s"], command)

    return _tool(box, shell)


def _tool(box: Sandbox, function: Callable[..., Any]) -> Tool:
    box.describe()
    return tool(effects="pure" if box.work is None else "write")(function)


async def _run(box: Sandbox, argv: list[str], text: str) -> str:
    ended = await box.run(argv, stdin=text.encode("utf-8", "replace"))
    out = ended.stdout.decode("utf-8", "replace")
    if ended.ended_by is None and ended.code == 0:
        return out
    why = {"time": "ran out of time", "output": "wrote too much"}.get(
        ended.ended_by or "", f"ended with status {ended.code}"
    )
    errors = ended.stderr.decode("utf-8", "replace")[-2000:]
    raise ToolFailed(f"it {why}\n{out[-2000:]}{errors}".rstrip())
