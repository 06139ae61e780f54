"""HTTP as the server and the router both speak it: streams, errors, and clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from decode.server.protocol import Failure, encode, from_validation
from jaxinfra.errors import UserError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
log = logging.getLogger("jaxinfra.serve")


class EventStream(StreamingResponse):
    """Server-sent events; however they end, what they are made from is closed."""

    def __init__(self, events: AsyncIterator[bytes], source: AsyncExitStack) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See StreamingResponse."""
        async with self._source:
            await super().__call__(scope, receive, send)


def event(value: Any) -> bytes:
    """`value` as a server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


class Gone(Exception):
    """The client has left: there is nobody to answer."""


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """`work`, cancelled when the client leaves. Raises Gone then."""

    async def leave() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Gone
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def handle_errors(made: FastAPI) -> None:
    """Every error of `made` has OpenAI's body from now on."""

    def respond(failure: Failure) -> Response:
        after = failure.retry_after
        headers = {"retry-after": str(after)} if after is not None else {}
        if failure.status == 401:
            headers["www-authenticate"] = "Bearer"
        content = encode(failure.body)
        return Response(content, failure.status, headers, media_type="application/json")

    async def failed(_: Request, error: Any) -> Response:
        return respond(error)

    async def invalid(_: Request, error: Any) -> Response:
        return respond(from_validation(error.errors()))

    async def refused(_: Request, error: Any) -> Response:
        return respond(Failure(error.status_code, str(error.detail)))

    async def told(_: Request, error: Any) -> Response:
        return respond(Failure(400, str(error)))

    async def gone(_: Request, error: Any) -> Response:
        return Response(status_code=499)

    async def unexpected(_: Request, error: Any) -> Response:
        log.exception("a request failed", exc_info=error)
        return respond(Failure(500, "an error of the server; its log says more"))

    handlers = {
        Failure: failed, RequestValidationError: invalid, HTTPException: refused,
        UserError: told, ValueError: told, Gone: gone, Exception: unexpected,
    }  # fmt: skip
    for kind, handler in handlers.items():
        made.add_exception_handler(kind, handler)
