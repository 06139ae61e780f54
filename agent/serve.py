"""An agent over HTTP: runs as streams of events, sessions that are kept, a key for each user.

    jaxinfra agent serve --url http://127.0.0.1:8000/v1 --model qwen3-0.6b

POST /v1/runs {"task": ..., "session": ...} answers with server-sent events, each `data: {"type":
...}`, the last of them `result`. Leaving early cancels the run, and the journal says so.
POST /v1/sessions/{id}/resume {"decisions": {call: true}} goes on; GET /v1/sessions lists,
GET /v1/sessions/{id} tells one, GET .../trace shows it as a page, DELETE forgets it.

A user's sessions have the user's name before theirs in the journal, so nobody can name another's.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import anyio
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from pydantic_core import to_json

from agent.journal import Conflict, SessionInfo, Store
from agent.loop import run_stream
from agent.messages import to_openai
from agent.spec import Agent
from agent.state import fold
from agent.trace_page import family, page
from jaxinfra.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Run(BaseModel):
    """The body of POST /v1/runs; without a session a new one begins."""

    task: str = Field(min_length=1, max_length=200_000)
    session: str | None = Field(None, pattern=f"^{_NAME.pattern}$")


class Resume(BaseModel):
    """The body of a resume: a person's answers by call, true, false or a refusal in words."""

    decisions: dict[str, bool | str] = {}


def app(agent: Agent, store: Store, keys: Mapping[str, str] | None = None) -> FastAPI:
    """The application. `keys` maps users to their keys, sent as `Authorization: Bearer KEY`;
    without any there is one user, and no key is asked for."""
    made = FastAPI(title="jaxinfra agent", docs_url=None, redoc_url=None)

    async def user(request: Request) -> str:
        if not keys:
            return "local"
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        # All are compared, so that the time tells nothing.
        matching = [name for name, key in keys.items() if hmac.compare_digest(key.encode(), given)]
        if not matching:
            raise HTTPException(401, "give your key: Authorization: Bearer KEY")
        return matching[0]

    def full(user: str, session: str) -> str:
        if not _NAME.fullmatch(session):
            raise HTTPException(404, "no such session")
        return f"{user}|{session}"

    @made.exception_handler(UserError)
    async def told(request: Request, error: UserError) -> JSONResponse:
        status = 404 if "no session" in str(error) else 409
        return JSONResponse({"error": str(error)}, status)

    @made.post("/v1/runs")
    async def begin(body: Run, user: str = Depends(user)) -> StreamingResponse:
        session = body.session or uuid.uuid4().hex
        name = full(user, session)
        state = fold(await store.read(name))
        if state.runs and state.finished is None:
            raise HTTPException(409, "the session has an unfinished run; resume it")
        return _streamed(session, run_stream(agent, body.task, store=store, session=name))

    @made.post("/v1/sessions/{session}/resume")
    async def go_on(session: str, body: Resume, user: str = Depends(user)) -> StreamingResponse:
        name = full(user, session)
        if not await store.read(name, until=1):
            raise HTTPException(404, "no such session")
        events = run_stream(agent, store=store, session=name, decisions=body.decisions)
        return _streamed(session, events)

    @made.get("/v1/sessions")
    async def sessions(user: str = Depends(user)) -> list[SessionInfo]:
        mine = [info for info in await store.sessions() if info.session.startswith(f"{user}|")]
        return [replace(info, session=info.session.partition("|")[2]) for info in mine]

    @made.get("/v1/sessions/{session}")
    async def one(session: str, user: str = Depends(user)) -> dict[str, Any]:
        events = await store.read(full(user, session))
        if not events:
            raise HTTPException(404, "no such session")
        state = fold(events)
        return {
            "session": session, "agent": state.agent,
            "messages": [to_openai(message) for message in state.messages],
            "waiting": state.waiting, "finished": state.finished,
            "tainted_by": state.tainted_by, "spent": state.spent,
        }  # fmt: skip

    @made.get("/v1/sessions/{session}/trace")
    async def trace(session: str, user: str = Depends(user)) -> HTMLResponse:
        name = full(user, session)
        return HTMLResponse(page(name, await family(store, name)))

    @made.delete("/v1/sessions/{session}")
    async def forget(session: str, user: str = Depends(user)) -> dict[str, bool]:
        name = full(user, session)
        there = bool(await store.read(name, until=1))
        await store.delete(name)
        return {"deleted": there}

    return made


def _streamed(session: str, run: Any) -> StreamingResponse:
    async def lines() -> AsyncIterator[bytes]:
        yield _line({"type": "session", "session": session})
        try:
            async with run as stream:
                async for event in stream:
                    yield _line(event)
        except (UserError, Conflict) as error:
            yield _line({"type": "error", "error": str(error)})
        else:
            result, end = stream.result, stream.result.state.finished
            yield _line({
                "type": "result", "reason": result.reason, "output": end and end.output,
                "detail": result.detail, "waiting": result.approvals,
            })  # fmt: skip

    return _Events(lines(), media_type="text/event-stream")


class _Events(StreamingResponse):
    """Cancels the run when the client has gone; starlette itself may only see it when a write
    fails, and some servers drop such writes in silence."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def listen(cancel: Any) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            cancel()

        lines: Any = self.body_iterator
        with contextlib.suppress(OSError):
            async with contextlib.aclosing(lines), anyio.create_task_group() as group:
                group.start_soon(listen, group.cancel_scope.cancel)
                await self.stream_response(send)
                group.cancel_scope.cancel()


def _line(value: Any) -> bytes:
    without = {"message": {"tokens"}}  # ids are the server's own business
    return b"data: " + to_json(value, exclude=without) + b"\n\n"
