"""The thread that owns an engine: requests and leases in, outputs out, and who used how much.

What a session computed is kept on the device, put into host memory or dropped, by when it is wanted
again: the soonest on the device, as far as its share goes, the next in host memory.

Everything that touches the engine happens here, between two steps. A step's wall seconds are split
among the requests by the tokens that it computed for each, and each page's share of those seconds
among the requests that hold it, so accounts add up to the total. Pages that only a lease or the
cache holds are nobody's. Cost: a step looks once at each page that a running request holds.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.host_pages import HostPages
from decode.policies import Policy
from decode.request import Output, QueueFull, Request
from jaxinfra.errors import UserError

if TYPE_CHECKING:
    from decode.engine import Engine
    from decode.scheduler import Sequence

Hear = Callable[["Output | Exception"], object]
_LATE = 10  # leases' time after which a prefix is not worth its place in host memory
_log = logging.getLogger("jaxinfra.engine")


@dataclass
class Used:
    """What was used: seconds of the engine, pages times seconds."""

    engine_s: float = 0.0
    page_s: float = 0.0


@dataclass(frozen=True)
class _Asked:
    """A request under way: who listens, in which event loop, who pays, and whose lease it ends. One
    that only reads leases its prompt at its end instead, as it is `wanted` then."""

    request: Request
    hear: Hear
    loop: asyncio.AbstractEventLoop
    used: Used
    key: str
    wanted: float | None = None


@dataclass(frozen=True)
class _Held:
    """A lease: its number, of which tokens, when they are wanted and when it ends (in seconds of
    time.monotonic())."""

    lease: int
    tokens: tuple[int, ...]
    salt: str
    wanted: float
    until: float


class EngineThread:
    """Runs `engine` until `close`. Leases take at most the share `leased` of its pages, and each
    ends after `lease` seconds; host memory takes as many pages as `host` times the engine's."""

    def __init__(
        self, engine: Engine, leased: float = 0.5, lease: float = 60.0, host: float = 1.0
    ) -> None:
        self.total = Used()
        self.host = HostPages(engine, int(host * engine.config.pages))
        self._engine = engine
        self._room, self._longest = int(leased * engine.config.pages), lease
        self._meter = _Meter(engine.scheduler.policy)
        engine.scheduler.policy = self._meter
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._asked: dict[str, _Asked] = {}  # by request
        self.held: dict[str, _Held] = {}  # by key
        self._last: list[tuple[Used, int, list[int]]] = []
        self._closed, self._why, self._over = False, "it was closed", False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, used: Used, key: str, hear: Hear, reads: float | None = None
    ) -> None:
        """Queues a request. `hear` is called in the running event loop: with its outputs, or with
        what kept it from being answered. The lease under `key` ends once the request has its pages.

        reads: its prompt is only to be computed, and is then leased under `key`, as it is wanted in
        so many seconds from now. The next request under `key` ends the reading.
        """
        wanted = None if reads is None else time.monotonic() + reads
        asked = _Asked(request, hear, asyncio.get_running_loop(), used, key, wanted)
        self.order(self._add, asked)

    def order(self, do: Callable[..., None], *given: Any) -> None:
        """Has the engine's thread call `do`, such as `abort`, `hold` or `release`, between two
        steps, in the order of asking."""
        self._orders.put(functools.partial(do, *given))
        if self._over:
            self._obey()

    def close(self) -> None:
        self.order(setattr, self, "_closed", True)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._obey()
                if self._engine.has_work():
                    self._step()
        except BaseException as error:
            self._why = f"{type(error).__name__}: {error}"
            _log.exception("the engine died")
        finally:
            self._tell([(id, self._gone()) for id in self._asked])
            self._asked.clear()
            self._engine.close()
            self.held, self._over = {}, True
            self._obey()

    def _obey(self) -> None:
        """Carries out what was ordered; without work waits for an order, or a lease's end."""
        idle = not (self._closed or self._over or self._engine.has_work())
        ends = min((held.until for held in self.held.values()), default=None)
        wait = None if ends is None else max(0.0, ends - time.monotonic())
        try:
            while True:
                self._orders.get(block=idle, timeout=wait if idle else None)()
                idle = False
        except queue.Empty:
            pass
        now = time.monotonic()
        for key in [key for key, held in self.held.items() if held.until <= now]:
            self._put_away(key)

    def _gone(self) -> UserError:
        return UserError(f"the engine is gone ({self._why}); load another")

    def _add(self, asked: _Asked) -> None:
        request = asked.request
        for id, other in list(self._asked.items()):
            if other.key == asked.key and other.wanted is not None:
                self._tell([(id, UserError("its session goes on"))])
                self.abort(id)
        self._asked[request.id] = asked
        try:
            if self._over:
                raise self._gone()
            self.host.bring_back(asked.key)
            self._engine.add(request)
        except (QueueFull, ValueError, UserError) as error:
            self._tell([(request.id, error)])
            self._asked.pop(request.id, None)

    def abort(self, id: str) -> None:
        """Ends a request; its pages are free before the next step."""
        asked = self._asked.pop(id, None)
        if asked is not None and not self._over:
            self._engine.abort(id)
            if asked.wanted is None:
                self._give_up(asked.key)

    def hold(self, key: str, tokens: tuple[int, ...], seconds: float, salt: str) -> None:
        """Leases the cached prefix of `tokens` under `key`, as it is wanted in so many seconds.

        Where leases take too much, the one that is wanted last goes into host memory; so does one
        that ends. What is wanted in more than _LATE leases' time is dropped at once."""
        if self._over:
            return
        self.host.bring_back(key)
        self._give_up(key)
        lease, now = self._engine.lease(tokens, seconds, salt), time.monotonic()
        if lease is None:
            return
        self.held[key] = _Held(lease, tokens, salt, now + seconds, now + self._longest)
        if seconds > self._longest:
            self._put_away(key)
        size = self._engine.config.page_size
        while sum(len(held.tokens) // size for held in self.held.values()) > self._room:
            self._put_away(max(self.held, key=lambda key: self.held[key].wanted))

    def _put_away(self, key: str) -> None:
        """From the device into host memory, or nowhere."""
        held = self.held[key]
        if held.wanted - time.monotonic() <= _LATE * self._longest:
            self.host.keep(key, held.tokens, held.salt, held.wanted)
        self._give_up(key)

    def release(self, key: str) -> None:
        """Ends the lease under `key`, if there is one; host memory forgets it, too."""
        self._give_up(key)
        self.host.drop(key)

    def _give_up(self, key: str) -> None:
        held = self.held.pop(key, None)
        if held is not None:
            self._engine.give_up(held.lease)

    def _step(self) -> None:
        scheduler = self._engine.scheduler
        began = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - began
        used = self._meter.taken(scheduler.running)
        # A step that computed nothing only read what the one before it made.
        self._last = [(self._asked[id].used, *what) for id, what in used.items()] or self._last
        self._charge(seconds, self._last)
        for output in outputs:
            asked = self._asked[output.request_id]
            if asked.wanted is None:
                self._give_up(asked.key)
            elif output.finish_reason is not None:
                soon, salt = asked.wanted - time.monotonic(), asked.request.cache_salt
                self.hold(asked.key, asked.request.prompt, max(0.0, soon), salt)
        self._tell([(output.request_id, output) for output in outputs])
        for output in outputs:
            if output.finish_reason is not None:
                self._asked.pop(output.request_id, None)

    def _charge(self, seconds: float, used: list[tuple[Used, int, list[int]]]) -> None:
        tokens = sum(count for _, count, _ in used)
        if not tokens:
            return
        holders = Counter(page for *_, pages in used for page in pages)
        self.total.engine_s += seconds
        self.total.page_s += len(holders) * seconds
        for payer, count, pages in used:
            payer.engine_s += seconds * count / tokens
            payer.page_s += seconds * sum(1 / holders[page] for page in pages)

    def _tell(self, news: list[tuple[str, Output | Exception]]) -> None:
        """Wakes each event loop once for all that it is told."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[str, Hear, Output | Exception]]] = {}
        for id, what in news:
            asked = self._asked[id]
            by_loop.setdefault(asked.loop, []).append((id, asked.hear, what))
        for loop, told in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, told)
            except RuntimeError:  # it was closed, and whoever asked has gone with it
                for id, *_ in told:
                    self._orders.put(functools.partial(self.abort, id))


def _deliver(told: list[tuple[str, Hear, Output | Exception]]) -> None:
    for _, hear, what in told:
        hear(what)


class _Meter:
    """A policy that keeps what another one's sequences were given in a step."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._used: dict[str, tuple[int, list[int]]] = {}

    def rank(self, sequence: Sequence) -> Any:
        return self._policy.rank(sequence)

    def served(self, sequence: Sequence, tokens: int) -> None:
        self._policy.served(sequence, tokens)
        self._used[sequence.request.id] = tokens, list(sequence.table.pages)

    def taken(self, running: list[Sequence]) -> dict[str, tuple[int, list[int]]]:
        """By request, tokens computed for it and pages that it holds; empty if none was."""
        used, self._used = self._used, {}
        for sequence in running if used else ():
            used.setdefault(sequence.request.id, (0, list(sequence.table.pages)))
        return used
