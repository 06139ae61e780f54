"""One engine for prompts and one for answers, each in a process of its own, seen as one transport.

A request's prompt goes to the first, and when it is computed to the second, which finds its pages
in `folder` (`decode.handover`). Prompts of less than a page, and those whose log-probabilities are
asked for, go to the second at once, as all do while the first is not there: when that dies, what it
was computing is computed by the second, and another is started, unless it dies again and again
(`decode.server.restarts`). When the second dies both end, and the Link tells everyone and starts
anew. This module imports no jax.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from decode.request import Request
from decode.server.drive import Message
from decode.server.restarts import Restarts
from decode.server.transport import InProcess, Transport

log = logging.getLogger("jaxinfra.serve")
HALVES = ("Prefills", "Decodes")  # of `decode.handover`
Hear = Callable[[Message], None]
Start = Callable[[Callable[[], Any], Hear], Transport]


def take_gpu(half: str) -> None:
    """Has this process see one GPU, if there are several; call it before jax is imported."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = Path("/proc/driver/nvidia/gpus")
    if named is not None:  # empty: none
        gpus = named.split(",")
    else:
        gpus = [str(i) for i, _ in enumerate(found.glob("*"))]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[HALVES.index(half)]
    else:  # both share its memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")


class TwoEngines:
    """See Transport. `prefills` and `decodes` make the engines, in the order of HALVES."""

    def __init__(
        self, prefills: Callable[[Path], Any], decodes: Callable[[Path], Any], hear: Hear,
        start: Start = InProcess,
    ) -> None:  # fmt: skip
        memory = Path("/dev/shm")
        self.folder = Path(
            tempfile.mkdtemp(prefix="jaxinfra-", dir=memory if memory.is_dir() else None)
        )
        self._hear, self._start = hear, start
        self._lock = threading.RLock()  # messages come in threads of both engines
        self._computing: dict[str, Request] = {}  # prompts at the first engine
        self._accepted: set[str] = set()  # by the first engine, and not by the second yet
        self._page = 0  # tokens of a page, once the first engine is there
        self._restarts, self._closing = Restarts(), False
        self._make_prefills = functools.partial(prefills, self.folder)
        with self._lock:  # nothing is heard before both are there
            self._second = start(functools.partial(decodes, self.folder), self._from_second)
            self._first: Transport | None = start(self._make_prefills, self._from_first)

    def post(self, message: Message) -> None:
        """See Transport."""
        with self._lock:
            match message:
                case ("add", request) if self._worth(request):
                    assert self._first is not None
                    self._computing[request.id] = request
                    self._first.post(message)
                    return
                case ("abort", id):
                    self._accepted.discard(id)
                    if self._computing.pop(id, None):
                        if self._first is not None:
                            self._first.post(message)
                        return
            self._second.post(message)

    def close(self, timeout: float = 10.0) -> None:
        """See Transport."""
        with self._lock:
            self._closing, first = True, self._first
        if first is not None:
            first.close(timeout)
        self._second.close(timeout)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _worth(self, request: Request) -> bool:
        there = self._first is not None and self._page > 0
        return there and len(request.prompt) > self._page and request.params.prompt_logprobs is None

    def _from_second(self, message: Message) -> None:
        match message:
            case ("accepted" | "refused" as said, id, *_):
                with self._lock:
                    known = id in self._accepted
                    self._accepted.discard(id)
                if known and said == "accepted":  # the first engine's word was passed on
                    return
        self._hear(message)

    def _from_first(self, message: Message) -> None:
        with self._lock:
            match message:
                case ("ready", info):
                    self._page = info.page_size
                case ("accepted", id) if id in self._computing:
                    self._accepted.add(id)
                    self._hear(message)  # so that the next prompt of its request comes
                case ("outputs", outputs):
                    for output in outputs:
                        self._on(output.request_id)
                case ("refused", id, *_):  # the second engine says whether it refuses too
                    self._on(id)
                case ("died", why):
                    self._died(why)

    def _on(self, id: str) -> None:
        request = self._computing.pop(id, None)
        if request is not None:
            self._second.post(("add", request))
        else:  # nobody waits for it any more
            with suppress(FileNotFoundError):
                (self.folder / id).unlink()

    def _died(self, why: str) -> None:
        log.error("the engine for prompts died, the other computes them: %s", why)
        dead, self._first, self._page = self._first, None, 0
        for id in list(self._computing):
            self._on(id)
        for part in self.folder.glob("*.part"):
            part.unlink()
        if dead is not None:
            threading.Thread(target=dead.close, daemon=True).start()
        if self._restarts.another() and not self._closing:
            self._first = self._start(self._make_prefills, self._from_first)
