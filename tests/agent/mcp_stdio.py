"""A server over standard input and output, for tests."""

import anyio

from agent.mcp import MCPServer
from tests.agent.sample_tools import add, refuse

if __name__ == "__main__":
    anyio.run(MCPServer([add, refuse]).run_stdio)
