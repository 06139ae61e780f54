"""What the commands do: agents in a terminal, with whatever a model wrote made harmless to it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Console
from rich.table import Table

from agent.events import ModelResponded, ToolFinished
from agent.execute import clean
from agent.gather import unwrapped
from agent.http_model import HTTPModel
from agent.journal import Store
from agent.limits import Limits
from agent.loop import Result, run_stream
from agent.model import Model, TextDelta
from agent.react import ReActModel
from agent.spec import Agent
from agent.sql_store import open_store
from agent.state import fold
from agent.tools import Tool
from jaxinfra.errors import UserError

if TYPE_CHECKING:
    from agent import commands

_SHOWN = 2000  # characters of a result on the terminal
_ENGINE = "engine:"  # before the name of a model that runs in this process


def open_model(who: commands.Which) -> Model:
    """The model that the flags name."""
    if who.url is None and who.model.startswith(_ENGINE):
        from agent.engine_model import EngineModel

        model = EngineModel.load(who.model.removeprefix(_ENGINE))
    elif who.url is None:
        raise UserError(
            "agent: no server is named; start one (jaxinfra serve MODEL) and give its address, "
            "such as --url http://127.0.0.1:8000/v1, or give --model engine:MODEL for an engine "
            "in this process"
        )
    else:
        model = HTTPModel(who.model, who.url)
    return ReActModel(model) if who.react else model


@contextlib.asynccontextmanager
async def open_agent(who: commands.Who) -> AsyncIterator[Agent]:
    """The agent that the flags describe, its MCP servers running while the block lasts."""
    async with contextlib.AsyncExitStack() as stack:
        tools: list[Tool] = []
        if "python" in who.tools or "shell" in who.tools:
            from agent.sandbox.tools import python_tool, shell_tool

            tools += [python_tool()] if "python" in who.tools else []
            tools += [shell_tool()] if "shell" in who.tools else []
        if "memory" in who.tools:
            from agent.memory import Memories, memory_tools

            memories = Memories.of_user(who.memory, os.environ.get("USER", "local"))
            stack.callback(memories.close)
            tools += memory_tools(memories)
        for i, server in enumerate(who.mcp):
            from mcp import StdioServerParameters

            from agent.mcp import mcp_tools

            command, *rest = shlex.split(server)
            where: Any = server
            if "://" not in server:
                where = StdioServerParameters(command=command, args=rest)
            prefix = f"s{i}_" if len(who.mcp) > 1 else ""
            tools += await stack.enter_async_context(mcp_tools(where, prefix=prefix))
        yield Agent("assistant", open_model(who), who.instructions, tuple(tools),
                    limits=Limits(turns=who.turns))  # fmt: skip


def converse(who: commands.Who, session: str | None, tasks: list[str] | None) -> None:
    """Does the tasks, or without any what the terminal asks for; exits with 1 if the last run did
    not end well."""
    console = Console(highlight=False)
    name = session or uuid.uuid4().hex[:12]

    async def main() -> bool:
        async with open_agent(who) as agent:
            state, good = fold(await store.read(name)), True
            if state.runs and state.finished is None:  # unfinished, or waiting for approval
                good = await _show(console, agent, store, name, None)
            for task in tasks if tasks is not None else _lines(console):
                good = await _show(console, agent, store, name, task)
        return good

    with contextlib.closing(open_store(who.journal)) as store:
        try:
            good = anyio.run(main)
        finally:
            console.print(f"[dim]session {name}; jaxinfra agent trace {name} shows it[/dim]")
    if not good:
        sys.exit(1)


def _lines(console: Console):
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if line:
            yield line


async def _show(
    console: Console, agent: Agent, store: Store, session: str, task: str | None
) -> bool:
    """One run, streamed, with its questions to the user; whether it ended well."""
    decisions: dict[str, bool | str] = {}
    while True:
        events = None
        with unwrapped():
            async with anyio.create_task_group() as group:
                group.start_soon(_stop_on_interrupt, group.cancel_scope)
                run = run_stream(agent, task, store=store, session=session, decisions=decisions)
                async with run as events:
                    async for event in events:
                        _print(console, event)
                group.cancel_scope.cancel()
        if events is None or events.result is None:
            console.print("\n[yellow]stopped[/yellow]")
            return False
        result = events.result
        if result.reason != "waiting":
            _conclude(console, result)
            return result.reason == "done"
        decisions, task = _ask(console, result), None
        if not decisions:
            return False


async def _stop_on_interrupt(scope: anyio.CancelScope) -> None:
    """Ctrl-C ends the run, which the journal then says, and not the conversation."""
    with anyio.open_signal_receiver(signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()


def _print(console: Console, event: Any) -> None:
    match event:
        case TextDelta():
            console.out(clean(event.text, _SHOWN), end="", highlight=False)
        case ModelResponded():
            console.print()
            for call in event.message.calls:
                shown = clean(f"{call.name}({call.arguments})", _SHOWN)
                console.print(f"-> {shown}", style="cyan", markup=False)
        case ToolFinished():
            style = "red" if event.error else "green"
            console.print(clean(event.content, _SHOWN), style=style, markup=False)


def _ask(console: Console, result: Result) -> dict[str, bool | str]:
    """What the user decides about the calls that wait; nothing where nobody can be asked."""
    if not sys.stdin.isatty():
        console.print("[yellow]a call waits for approval; go on with jaxinfra agent chat[/yellow]")
        return {}
    decided: dict[str, bool | str] = {}
    for request in result.approvals:
        call = clean(f"{request.call.name}({request.call.arguments})", _SHOWN)
        console.print(f"{call}\n{request.reason}", style="yellow", markup=False)
        answer = console.input("Allow? [y/N, or say why not] ").strip()
        decided[request.call.id] = answer.lower() in ("y", "yes") or answer
    return decided


def _conclude(console: Console, result: Result) -> None:
    if result.reason != "done":
        console.print(f"{result.reason}: {clean(result.detail, _SHOWN)}", style="red", markup=False)
    elif not isinstance(result.output, str):
        console.print(clean(str(result.output), _SHOWN), markup=False)
    spent = result.state.spent
    console.print(
        f"[dim]{spent.turns} turns, {spent.tool_calls} calls, {spent.tokens} tokens, "
        f"{spent.seconds:.1f} s[/dim]"
    )


def list_sessions(journal: str) -> None:
    """Prints a table of the journal's sessions."""

    async def main() -> Table:
        table = Table("session", "last", "events", "agent", "stands", "asked")
        for info in await store.sessions():
            state = fold(await store.read(info.session))
            asked = next((m.content for m in state.messages if m.role == "user"), "")
            stands = state.finished.reason if state.finished else (
                "waiting" if state.waiting else "unfinished"
            )  # fmt: skip
            last = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.last))
            row = (info.session, last, str(info.events), state.agent, stands, asked[:60])
            table.add_row(*(clean(cell, 80).replace("[", "\\[") for cell in row))
        return table

    with contextlib.closing(open_store(journal, existing=True)) as store:
        Console().print(anyio.run(main))


def serve(command: commands.Serve, keys: dict[str, str]) -> None:
    """Serves until interrupted."""
    import uvicorn

    from agent.serve import app

    # The thread that flushes the journal takes turns with this one: the default of 5 ms is long.
    sys.setswitchinterval(0.0005)

    async def main() -> None:
        async with open_agent(command.who) as agent:
            config = uvicorn.Config(app(agent, store, keys), host=command.host, port=command.port,
                                    log_level="info")  # fmt: skip
            await uvicorn.Server(config).serve()

    with contextlib.closing(open_store(command.who.journal)) as store:
        anyio.run(main)
