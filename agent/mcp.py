"""The Model Context Protocol on the official SDK: others' tools imported, ours exported.

    async with mcp_tools(StdioServerParameters(command="server")) as tools:
        await run(Agent("a", model, tools=tools), "...")
    await MCPServer([search, python_tool()]).run_stdio()

An imported tool is a stranger's until said otherwise: its results taint, it counts as writing and
as sending data away, whatever the server claims about it. Its description, which the model reads,
can be pinned, so a server that changes it later is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, create_model, model_validator

from agent.execute import clean, execute
from agent.gather import unwrapped
from agent.messages import ToolCall
from agent.policy import Policy, decide
from agent.redact import Redactor
from agent.tools import ANY_ARGUMENTS, ArgumentError, Context, Tool, ToolFailed, ignore, without
from jaxinfra.errors import UserError

_LONGEST = 4000  # characters of a description that a model reads


@contextlib.asynccontextmanager
async def mcp_tools(
    server: Any, *, prefix: str = "", pins: Mapping[str, str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> AsyncIterator[tuple[Tool, ...]]:  # fmt: skip
    """The tools of a server (what `mcp.Client` takes: a URL, StdioServerParameters, a server of
    this process), while the block lasts.

    `prefix` goes before their names. `options` are fields of Tool by the server's name for it, such
    as {"search": {"effects": "pure"}}. `pins` are fingerprints by name (see `fingerprint`); a tool
    that is missing from them or differs raises UserError.
    """
    from mcp import Client, MCPError

    with unwrapped():  # the SDK's task groups wrap what is raised in the block, too
        async with contextlib.AsyncExitStack() as stack:
            try:
                client = await stack.enter_async_context(Client(server))
                found = await _listed(client)
            except (MCPError, OSError, RuntimeError) as error:
                raise UserError(f"MCP server {server}: {error}") from None
            made = tuple(
                _import(client, one, prefix, (options or {}).get(one.name, {})) for one in found
            )
            for one, tool in zip(found, made, strict=True):
                if pins is not None and pins.get(one.name) != fingerprint(tool):
                    raise UserError(
                        f"MCP server {server}: {one.name!r} is not the tool that was pinned; "
                        f"read its description, then pin {fingerprint(tool)}"
                    )
            yield made


async def _listed(client: Any) -> list[Any]:
    page = await client.list_tools()
    found = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        found += page.tools
    return found


def fingerprint(tool: Tool) -> str:
    """A hash of all that a model is told about the tool, save its name."""
    told = json.dumps([tool.description, dict(tool.spec.parameters)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _arguments(listed: Any) -> type[BaseModel]:
    """What checks arguments by the schema that the server gave. The schema is a stranger's too:
    nothing it refers to is fetched, and its patterns, which can take for ever, are left to the
    server."""
    from jsonschema import exceptions, validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    schema = without(listed.input_schema, "pattern", "patternProperties")
    try:
        of_its_kind = validators.validator_for(schema)
        of_its_kind.check_schema(listed.input_schema)
    except exceptions.SchemaError as error:
        raise UserError(f"MCP: the schema of {listed.name!r} is none: {error.message}") from None
    validator = of_its_kind(schema, registry=Registry())

    def fits(values: Any) -> Any:
        try:
            wrong = exceptions.best_match(validator.iter_errors(values))
        except (Unresolvable, RecursionError) as error:
            raise ValueError(f"its schema is broken: {error}") from None
        if wrong is not None:
            raise ValueError(f"{'.'.join(map(str, wrong.absolute_path))}: {wrong.message}")
        return values

    checks: Any = {"fits": model_validator(mode="before")(fits)}
    return create_model("any", __base__=ANY_ARGUMENTS, __validators__=checks)


def _import(client: Any, listed: Any, prefix: str, options: Mapping[str, Any]) -> Tool:
    name = f"{prefix}{listed.name}".replace("-", "_").replace(".", "_")
    if not name.isidentifier() or len(name) > 64:
        raise UserError(f"MCP: a tool named {listed.name!r}; models know letters, digits and _")

    async def call(**arguments: Any) -> str:
        from mcp import MCPError

        try:
            result = await client.call_tool(listed.name, arguments)
        except MCPError as error:
            raise ToolFailed(str(error)) from None
        text = "\n".join(_text(block) for block in result.content)
        if result.is_error:
            raise ToolFailed(text or "it failed")
        return text

    told: dict[str, Any] = {"effects": "write", "network": True, "untrusted": True, **options}
    return Tool(name, clean(listed.description or "", _LONGEST), call, _arguments(listed),
                schema=listed.input_schema, **told)  # fmt: skip


def _text(block: Any) -> str:
    if block.type == "text":
        return block.text
    size = len(getattr(block, "data", "") or "")
    return f"[{block.type} {getattr(block, 'mime_type', None) or ''} {size} characters]"


class MCPServer:
    """Our tools as a server: `run_stdio`, or `http_app` for uvicorn.

    `policy` decides as for an agent; what it would ask a person about is refused, as nobody sits
    here. Secrets are taken out of results.
    """

    def __init__(
        self, tools: Sequence[Tool], *, name: str = "jaxinfra", policy: Policy | None = None,
        redactor: Redactor | None = None, deps: Any = None,
    ):  # fmt: skip
        from mcp.server.lowlevel import Server

        self._tools = {tool.name: tool for tool in tools}
        self._policy, self._redactor, self._deps = policy or Policy(), redactor or Redactor(), deps
        self.server = Server(name, on_list_tools=self._list, on_call_tool=self._call)

    async def run_stdio(self) -> None:
        """Serves standard input and output until they close."""
        from mcp.server.stdio import stdio_server

        async with stdio_server() as (read, write):
            await self.server.run(read, write, self.server.create_initialization_options())

    def http_app(self, **options: Any) -> Any:
        """An ASGI application that serves /mcp; `options` are those of the SDK."""
        return self.server.streamable_http_app(**options)

    async def _list(self, context: Any, params: Any) -> Any:
        from mcp import types

        return types.ListToolsResult(tools=[
            types.Tool(
                name=tool.name, description=tool.description,
                input_schema=dict(tool.spec.parameters),
                annotations=types.ToolAnnotations(
                    read_only_hint=tool.effects == "pure", open_world_hint=tool.network,
                    idempotent_hint=tool.effects != "write",
                ),
            )
            for tool in self._tools.values()
        ])  # fmt: skip

    async def _call(self, context: Any, params: Any) -> Any:
        from mcp import types

        text, failed = await self._answer(params.name, json.dumps(params.arguments or {}))
        block = types.TextContent(type="text", text=self._redactor.text(text))
        return types.CallToolResult(content=[block], is_error=failed)

    async def _answer(self, name: str, arguments: str) -> tuple[str, bool]:
        tool = self._tools.get(name)
        if tool is None:
            return f"there is no tool {name!r}; there are: {', '.join(self._tools)}", True
        with contextlib.suppress(ArgumentError):  # `execute` tells what is wrong with them
            decision = decide(self._policy, tool, tool.parse(arguments), ())
            if decision.action != "allow":
                return f"not allowed: {decision.reason}", True

        ended = await execute(tool, ToolCall("", name, arguments), Context(self._deps), ignore)
        return ended.content, ended.error is not None
