"""The MCP SDK before its version 2, with the handshake that servers of today may do without."""

import asyncio
import json
import sys

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamablehttp_client


async def told(session: ClientSession) -> dict:
    """What the server says to the calls that an inspector makes."""
    began = await session.initialize()
    await session.send_ping()
    tools = await session.list_tools()
    good = await session.call_tool("add", {"a": 1, "b": 2})
    wrong = await session.call_tool("add", {"a": "x"})
    unknown = await session.call_tool("nothing", {})
    return {"version": began.protocolVersion, "tools": [t.name for t in tools.tools],
            "schema": tools.tools[0].inputSchema, "good": good.content[0].text,
            "wrong": [wrong.isError, wrong.content[0].text],
            "unknown": [unknown.isError, unknown.content[0].text]}  # fmt: skip


async def main() -> dict:
    url, command, *arguments = sys.argv[1:]
    found = {}
    async with (
        stdio_client(StdioServerParameters(command=command, args=arguments)) as (
            read,
            write,
        ),
        ClientSession(read, write) as session,
    ):
        found["stdio"] = await told(session)
    async with (
        streamablehttp_client(url) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        found["http"] = await told(session)
    return found


print(json.dumps(asyncio.run(main())))
