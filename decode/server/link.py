"""The server's side of the engine: requests in, outputs as they come, for asyncio.

One Link outlives its engine: when that dies, everyone who waits gets an error, and another starts.
This module imports no jax.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from decode.server.drive import Message
from decode.server.protocol import Failure
from decode.server.restarts import Restarts
from decode.server.transport import Transport
from decode.stats import Info

if TYPE_CHECKING:
    from decode.request import Output, Request

log = logging.getLogger("jaxinfra.serve")
_ACCEPTED = object()
Spawn = Callable[[Callable[[Message], None]], Transport]


class Link:
    """Talks to the engine that `spawn` starts; every method but `hear` is for the loop's thread."""

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn
        self._transport: Transport | None = None
        self._waiting: dict[str, asyncio.Queue[Any]] = {}
        self._restarts = Restarts()
        self._finished: deque[float] = deque(maxlen=64)
        self._ready = asyncio.Event()
        self._given_up = asyncio.Event()
        self.info: Info | None = None
        self.stats: Any = None
        self.restarts = 0
        self.why = ""  # the last engine died
        self.closing = False

    @property
    def ready(self) -> bool:
        """Whether an engine takes requests."""
        return self._ready.is_set() and not self.closing

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Starts the engine, and ends it with the block; does not wait until it is ready."""
        self._start()
        try:
            yield
        finally:
            self.closing = True
            assert self._transport is not None
            await asyncio.to_thread(self._transport.close)

    async def wait_ready(self) -> None:
        """Waits for the first engine. Raises RuntimeError when it does not start."""
        waits = [asyncio.ensure_future(one.wait()) for one in (self._ready, self._given_up)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
        if not self._ready.is_set():
            raise RuntimeError(self.why)

    async def wait_given_up(self) -> None:
        """Waits until no engine will be started any more, because they die."""
        await self._given_up.wait()

    def _start(self) -> None:
        loop, life = asyncio.get_running_loop(), object()
        self._life = life

        def hear(message: Message) -> None:
            with suppress(RuntimeError):  # of a closed loop: nobody is left to hear
                loop.call_soon_threadsafe(self._take, life, message)

        self._transport = self._spawn(hear)

    def _take(self, life: object, message: Message) -> None:
        if life is not self._life:
            return
        match message:
            case ("outputs", outputs):
                for output in outputs:
                    if (queue := self._waiting.get(output.request_id)) is not None:
                        queue.put_nowait(output)
            case ("accepted", id):
                if (queue := self._waiting.get(id)) is not None:
                    queue.put_nowait(_ACCEPTED)
            case ("refused", id, status, why):
                if (queue := self._waiting.get(id)) is not None:
                    after = self.retry_after() if status == 429 else None
                    queue.put_nowait(Failure(status, why, retry_after=after))
            case ("stats", stats):
                self.stats = stats
            case ("ready", info):
                self.info = info
                self._ready.set()
            case ("died", why):
                self._died(why)

    def _died(self, why: str) -> None:
        log.error("the engine died: %s", why)
        self.why = why
        self._ready.clear()
        for queue in self._waiting.values():
            queue.put_nowait(Failure(500, "the engine died; send the request again"))
        old, self._life = self._transport, None
        if old is not None:
            asyncio.get_running_loop().run_in_executor(None, old.close)
        if not self._restarts.another() or self.closing or self.info is None:
            self._given_up.set()
            return
        self.restarts += 1
        self._start()

    def retry_after(self) -> int:
        """Seconds until the queue should have room, by how fast requests ended lately."""
        if len(self._finished) < 2:
            return 1
        apart = (self._finished[-1] - self._finished[0]) / (len(self._finished) - 1)
        return max(1, min(60, round(apart * len(self._waiting))))

    @asynccontextmanager
    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[AsyncIterator[Output]]:
        """The outputs of `requests`, all of which the engine has accepted; leaving aborts them.

        Raises Failure when the engine refuses one (400, 429), is not there (503) or dies (500,
        also from the iterator).
        """
        if not self.ready or self._transport is None:
            raise Failure(503, "the engine is not ready", retry_after=5)
        transport, queue = self._transport, asyncio.Queue()
        left = {request.id: request.params.n for request in requests}
        early: list[Output] = []

        async def next_item() -> Any:
            item = await queue.get()
            if isinstance(item, Failure):
                raise item
            return item

        async def outputs() -> AsyncIterator[Output]:
            while left:
                output = early.pop(0) if early else await next_item()
                if output.finish_reason is not None:
                    left[output.request_id] -= 1
                    if not left[output.request_id]:
                        del left[output.request_id]
                        self._finished.append(time.monotonic())
                yield output

        try:
            for request in requests:
                self._waiting[request.id] = queue
                transport.post(("add", request))
                while (item := await next_item()) is not _ACCEPTED:
                    early.append(item)
            yield outputs()
        finally:
            there = transport is self._transport and self._ready.is_set()
            for request in requests:
                if self._waiting.pop(request.id, None) and request.id in left and there:
                    transport.post(("abort", request.id))
