"""A server from start to end: uvicorn around the application, the engine behind it.

SIGTERM or Ctrl-C: no new connection is taken, what is being answered is answered (for at most
`drain` seconds), then the engine ends. An engine that does not start, or dies again and again, ends
the server with status 1, so that whoever supervises it knows. This module imports no jax.
"""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn

from decode.server.app import Settings, app
from decode.server.link import Link, Spawn
from jaxinfra.errors import UserError
from jaxinfra.text import Tokenizer


def run(
    spawn: Spawn,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain: int = 60,
) -> None:
    """Serves until told to end. `spawn` starts the engine, in a process of its own.

    Raises UserError when the address is taken, or the engine does not come up or stay up.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    asyncio.run(_serve(spawn, tokenizer, settings, host, port, drain))


async def _serve(
    spawn: Spawn, tokenizer: Tokenizer, settings: Settings, host: str, port: int,
    drain: int,
) -> None:  # fmt: skip
    link = Link(spawn)
    config = uvicorn.Config(
        app(link, tokenizer, settings), log_level="warning", timeout_graceful_shutdown=drain,
        lifespan="on",
    )  # fmt: skip
    server = uvicorn.Server(config)
    try:
        listener = socket.create_server((host, port), backlog=2048, family=_family(host))
    except OSError as error:
        raise UserError(f"serve: {host}:{port}: {error.strerror}; give another --port") from None
    with listener:
        serving = asyncio.create_task(server.serve([listener]))
        starting = asyncio.create_task(link.wait_ready())
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and starting.exception() is None:
            where = f"{host}:{listener.getsockname()[1]}"
            print(f"{settings.model} at http://{where}/v1, a page at http://{where}", flush=True)
            starting = asyncio.create_task(link.wait_given_up())
            await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        gave_up = starting.done()
        server.should_exit = True
        starting.cancel()
        await serving
    if gave_up:
        raise UserError(f"serve: the engine is gone: {link.why}")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
