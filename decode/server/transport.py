"""Where an engine lives: in a thread of the server, or in a process behind ZMQ.

Each is one life of an engine: made, told messages, closed; when the engine dies, ("died", why) is
the last thing heard of it. This module imports no jax.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import zmq

from decode.server.drive import Message, drive

_PATIENCE = 500  # milliseconds: how long an idle side waits before it looks whether the other lives


class Transport(Protocol):
    """One life of an engine."""

    def post(self, message: Message) -> None:
        """Hands `message` to the engine, without waiting; from one thread at a time.

        To an engine that died it is lost, also before ("died", why) is heard.
        """
        ...

    def close(self, timeout: float = 10.0) -> None:
        """Ends the engine, and waits for it at most `timeout` seconds."""
        ...


class InThread:
    """The engine in a thread; `hear` is called there with every message."""

    def __init__(self, build: Callable[[], Any], hear: Callable[[Message], None]) -> None:
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()

        def receive(wait: bool) -> Message | None:
            try:
                return (
                    self._inbox.get(timeout=_PATIENCE / 1000) if wait else self._inbox.get_nowait()
                )
            except queue.Empty:
                return None

        def run() -> None:
            with suppress(Exception):  # it was told as ("died", ...)
                drive(build, receive, hear)

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()

    def post(self, message: Message) -> None:
        """See Transport."""
        self._inbox.put(message)

    def close(self, timeout: float = 10.0) -> None:
        """See Transport."""
        self._inbox.put(("stop",))
        self._thread.join(timeout)


class InProcess:
    """The engine in a process of its own, which ends with this one; `build` must pickle."""

    def __init__(self, build: Callable[[], Any], hear: Callable[[Message], None]) -> None:
        # Only this user can reach sockets in this folder, so what comes through may be unpickled.
        self._folder = tempfile.TemporaryDirectory(prefix="jaxinfra-")
        down, up = (f"ipc://{Path(self._folder.name) / name}" for name in ("down", "up"))
        self._context = zmq.Context()
        self._down = self._context.socket(zmq.PUSH)
        self._down.setsockopt(zmq.LINGER, 0)
        self._down.setsockopt(zmq.SNDHWM, 0)  # only where nobody listens would a send wait
        self._down.bind(down)
        self._up = self._context.socket(zmq.PULL)
        self._up.bind(up)
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(
            target=_child, args=(build, down, up, os.getpid()), name="engine", daemon=True
        )
        self._process.start()
        self._closing = False
        self._hear = hear
        self._listener = threading.Thread(target=self._listen, name="engine-up", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        why = "the engine's process ended"
        while True:
            if self._up.poll(_PATIENCE):
                message = pickle.loads(self._up.recv())
                if message[0] == "died":
                    why = message[1]
                else:
                    self._hear(message)
            elif not self._process.is_alive():
                break
        self._up.close()
        if not self._closing:
            self._hear(("died", f"{why} (exit code {self._process.exitcode})"))

    def post(self, message: Message) -> None:
        """See Transport."""
        self._sent(message)

    def _sent(self, message: Message) -> bool:
        try:
            self._down.send(pickle.dumps(message), zmq.NOBLOCK)
        except zmq.Again:  # nobody listens: it is gone, or not there yet
            return False
        return True

    def close(self, timeout: float = 10.0) -> None:
        """See Transport."""
        self._closing = True
        if self._process.is_alive():
            if self._sent(("stop",)):
                self._process.join(timeout)
            if self._process.is_alive():
                self._process.kill()
        self._listener.join(timeout)
        self._down.close()
        self._context.term()
        self._folder.cleanup()


def _child(build: Callable[[], Any], down: str, up: str, parent: int) -> None:
    # A Ctrl-C in the terminal goes to both; the server ends its engine when requests are done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    outbox.setsockopt(zmq.LINGER, 1000)
    inbox.connect(down)
    outbox.connect(up)

    def receive(wait: bool) -> Message | None:
        if inbox.poll(_PATIENCE if wait else 0):
            return pickle.loads(inbox.recv())
        return ("stop",) if os.getppid() != parent else None

    try:
        drive(build, receive, lambda message: outbox.send(pickle.dumps(message)))
    finally:
        inbox.close()
        outbox.close()
        context.term()
