"""The server of `mcp_stdio` over HTTP, for clients of other environments; prints where."""

import socket

import uvicorn

from agent.mcp import MCPServer
from tests.agent.sample_tools import add, refuse

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/mcp", flush=True)
        app = MCPServer([add, refuse]).http_app()
        uvicorn.Server(uvicorn.Config(app, log_level="warning", log_config=None)).run([listener])
