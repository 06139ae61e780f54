"""One address for several servers: which gets a request, and what happens when one fails.

    jaxinfra route http://10.0.0.1:8000 http://10.0.0.2:8000 --policy prefix

Policies order the servers that are healthy, best first. `prefix` sends a prompt to where most of
its beginning went before, as that server's cache holds it, unless that one is busier than the
idlest by `gap` requests; beginnings are remembered as hashes of 256 characters each, chained, the
least recently used forgotten. A request goes on to the next server when one cannot be reached or
refuses (429, 502, 503, 504); once a client has a byte of a stream, nothing is sent again. This
module imports no jax. Cost: about 1 ms a request and 0.1 ms a chunk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily

from decode.server.exchange import DONE, EventStream, event, handle_errors, unless_gone
from decode.server.limits import LimitedBody
from decode.server.protocol import Failure

_REFUSALS = (429, 502, 503, 504)
_KEPT = ("authorization", "content-type", "accept", "x-session-id")
_RETURNED = ("content-type", "retry-after", "www-authenticate")


@dataclass(eq=False)
class Server:
    """One of the servers, as the router sees it."""

    url: str
    healthy: bool = True
    load: int = 0  # requests under way through this router
    known: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # beginnings sent there


class Policy(Protocol):
    """Orders `servers` for a request: the first is tried first. There is at least one."""

    def order(self, servers: Sequence[Server], text: str, session: str) -> list[Server]:
        """text: what the prompt begins with. session: who asks, where that is known."""
        ...


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._turn = -1

    def order(self, servers: Sequence[Server], text: str, session: str) -> list[Server]:
        """See Policy."""
        self._turn += 1
        at = self._turn % len(servers)
        return [*servers[at:], *servers[:at]]


class LeastLoad:
    """The one with the fewest requests under way; of equals, each in turn."""

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def order(self, servers: Sequence[Server], text: str, session: str) -> list[Server]:
        """See Policy."""
        turn = self._turns.order(servers, text, session)
        return sorted(turn, key=lambda server: server.load)


class Affinity:
    """A session stays where it is, by rendezvous hashing: when a server leaves, only its sessions
    move (Thaler and Ravishankar, 1998). Without a session, the least load."""

    def __init__(self) -> None:
        self._others = LeastLoad()

    def order(self, servers: Sequence[Server], text: str, session: str) -> list[Server]:
        """See Policy."""
        if not session:
            return self._others.order(servers, text, session)
        return sorted(servers, key=lambda server: _hash(f"{session}|{server.url}".encode()))


class Prefix:
    """Where the longest beginning is known, unless that one has `gap` requests more than another.

    chunk: characters of a beginning that are looked up at once. room: beginnings kept a server.
    """

    def __init__(self, gap: int = 8, chunk: int = 256, room: int = 65536) -> None:
        self._gap, self._chunk, self._room = gap, chunk, room
        self._others = LeastLoad()

    def order(self, servers: Sequence[Server], text: str, session: str) -> list[Server]:
        """See Policy."""
        chain = self._chain(text)
        least = min(server.load for server in servers)

        def rank(server: Server) -> int:
            known = next((n for n in range(len(chain), 0, -1) if chain[n - 1] in server.known), 0)
            return -known if server.load < least + self._gap else 1

        order = sorted(self._others.order(servers, text, session), key=rank)
        for link in chain:
            order[0].known[link] = None
            order[0].known.move_to_end(link)
        while len(order[0].known) > self._room:
            order[0].known.popitem(last=False)
        return order

    def _chain(self, text: str) -> list[bytes]:
        link, chain = b"", []
        for at in range(0, len(text) - self._chunk + 1, self._chunk):
            link = _hash(link + text[at : at + self._chunk].encode(errors="replace"))
            chain.append(link)
        return chain


POLICIES = {"affinity": Affinity, "load": LeastLoad, "prefix": Prefix, "turns": RoundRobin}


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def router(urls: Sequence[str], policy: Policy, *, every: float = 2.0) -> FastAPI:
    """The application. Servers are asked for their health `every` so many seconds."""
    servers = [Server(url.rstrip("/").removesuffix("/v1")) for url in urls]
    limits = httpx2.Limits(max_connections=None)
    client = httpx2.AsyncClient(limits=limits, timeout=httpx2.Timeout(None, connect=5.0))
    registry = CollectorRegistry()
    sent = Counter("jaxinfra_route_requests", "Answers by server.", ["server", "status"],
                   registry=registry)  # fmt: skip
    registry.register(_Gauges(servers))  # pyright: ignore[reportArgumentType]

    async def check(server: Server) -> None:
        while True:
            try:
                answer = await client.get(server.url + "/health", timeout=every + 3.0)
                server.healthy = answer.status_code == 200
            except httpx2.HTTPError:
                server.healthy = False
            await asyncio.sleep(every)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        checks = [asyncio.create_task(check(server)) for server in servers]
        try:
            yield
        finally:
            for one in checks:
                one.cancel()
            await client.aclose()

    made = FastAPI(title="jaxinfra route", docs_url=None, redoc_url=None, openapi_url=None,
                   lifespan=lifespan)  # fmt: skip
    made.add_middleware(LimitedBody, limit=16 << 20)
    handle_errors(made)

    async def first_answer(
        order: list[Server], request: httpx2.Request, stack: AsyncExitStack
    ) -> tuple[Server, httpx2.Response]:
        """The first answer that is none of _REFUSALS, or else the last refusal."""
        refusal: tuple[Server, httpx2.Response] | None = None
        for server in order:
            url = httpx2.URL(server.url + request.url.raw_path.decode())
            own = client.build_request(request.method, url, content=request.content,
                                       headers=request.headers)  # fmt: skip
            own.headers["host"] = url.netloc.decode()
            server.load += 1
            async with AsyncExitStack() as attempt:
                attempt.callback(_unload, server)
                try:
                    response = await client.send(own, stream=True)
                    attempt.push_async_callback(response.aclose)
                    streams = "event-stream" in response.headers.get("content-type", "")
                    if not streams:
                        await response.aread()
                except httpx2.HTTPError:
                    server.healthy = False
                    sent.labels(server.url, "0").inc()
                    continue
                sent.labels(server.url, str(response.status_code)).inc()
                if response.status_code not in _REFUSALS:
                    await stack.enter_async_context(attempt.pop_all())
                    return server, response
                refusal = server, response
        if refusal is None:
            raise Failure(503, "no server can be reached", retry_after=round(every) or 1)
        return refusal

    @made.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if any(server.healthy for server in servers) else 503)

    @made.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @made.api_route("/{path:path}", methods=["GET", "POST"])
    async def pass_on(http: Request, path: str) -> Response:
        content = await http.body()
        text, session = _prompt(content)
        session = session or http.headers.get("x-session-id", "")
        healthy = [server for server in servers if server.healthy] or servers
        order = policy.order(healthy, text, session)
        headers = {name: http.headers[name] for name in _KEPT if name in http.headers}
        asked = httpx2.Request(http.method, f"http://server/{path}", content=content,
                               headers=headers)  # fmt: skip
        stack = AsyncExitStack()
        try:
            answering = first_answer(order, asked, stack)
            server, response = await unless_gone(http, answering)
        except BaseException:
            await stack.aclose()
            raise
        if "event-stream" in response.headers.get("content-type", ""):
            return EventStream(_through(server, response), stack)
        await stack.aclose()
        back = {name: response.headers[name] for name in _RETURNED if name in response.headers}
        return Response(response.content, response.status_code, back)

    return made


def _unload(server: Server) -> None:
    server.load -= 1


async def _through(server: Server, response: httpx2.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    except httpx2.HTTPError:
        server.healthy = False
        yield event(Failure(502, "the server broke off; send the request again").body)
        yield DONE


def _prompt(content: bytes) -> tuple[str, str]:
    """What a request's prompt begins with, and its session; nothing of what is no request."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return "", ""
    if not isinstance(body, dict):
        return "", ""
    said = body.get("prompt", body.get("messages", ""))
    session = body.get("prompt_cache_key") or body.get("user") or ""
    return said if isinstance(said, str) else json.dumps(said), str(session)


class _Gauges:
    """Health and load of the servers."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers

    def collect(self) -> Any:
        healthy = GaugeMetricFamily("jaxinfra_route_healthy", "1 or 0.", labels=["server"])
        load = GaugeMetricFamily("jaxinfra_route_load", "Requests under way.", labels=["server"])
        for server in self._servers:
            healthy.add_metric([server.url], float(server.healthy))
            load.add_metric([server.url], server.load)
        return healthy, load
