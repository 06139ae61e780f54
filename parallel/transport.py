"""A ring all-reduce between processes, over pipes or ZMQ sockets: NCCL's algorithm, plain parts.

The same 2 (n-1) messages of 1/n of the array as `collectives.all_reduce`, but each device is an
operating-system process and each message goes through the kernel. A lesson and a measure of what a
transport costs, not a back end: XLA's own collectives (NCCL, gloo, ICI) train models.

Cost of a process: 2 (n-1)/n b bytes out and in, n-1 additions of b/n; a pipe copies each byte twice
(into the kernel and out), a ZMQ socket over TCP goes through the network stack as well.

    python -m parallel.transport 4 zmq
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from jaxinfra.errors import UserError

TIMEOUT = 120.0  # seconds that a process waits for its neighbour, which may have to start


class Link(Protocol):
    """A process's two ends: to the next process of the ring and from the one before."""

    def send(self, data: bytes) -> None: ...
    def receive(self) -> bytes: ...


class Pipes:
    """Anonymous pipes of one machine. A full one blocks its writer, so a thread writes to it."""

    def __init__(self, onward: Connection, back: Connection) -> None:
        self.onward, self.back = onward, back
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    def send(self, data: bytes) -> None:
        self._queue.put(data)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the next process is gone: who waits for it says so
            while True:
                self.onward.send_bytes(self._queue.get())

    def receive(self) -> bytes:
        if not self.back.poll(TIMEOUT):
            raise TimeoutError(f"transport: no message within {TIMEOUT:.0f} s; did a process end?")
        return self.back.recv_bytes()


class Sockets:
    """ZMQ sockets over TCP, which also cross machines. ZMQ queues what is sent."""

    def __init__(self, onward: str, here: str) -> None:
        import zmq

        context = zmq.Context.instance()
        self.back = context.socket(zmq.PULL)
        self.back.setsockopt(zmq.RCVTIMEO, int(TIMEOUT * 1000))
        self.back.bind(here)
        self.onward = context.socket(zmq.PUSH)
        self.onward.connect(onward)
        self.again = zmq.Again

    def send(self, data: bytes) -> None:
        self.onward.send(data)

    def receive(self) -> bytes:
        try:
            return self.back.recv()
        except self.again:
            raise TimeoutError(
                f"transport: no message within {TIMEOUT:.0f} s; did a process end?"
            ) from None


def all_reduce(x: np.ndarray, rank: int, n: int, link: Link) -> np.ndarray:
    """The sum of every process's x [n m, ...], on each of them.

    A reduce-scatter, after which process i has the sum of part i, and an all-gather.
    """
    if x.shape[0] % n:
        raise UserError(f"transport: {x.shape[0]} rows are no multiple of {n} processes; pad them")
    parts = x.reshape(n, -1).copy()

    def exchange(out: int) -> np.ndarray:
        link.send(parts[out].tobytes())
        return np.frombuffer(link.receive(), x.dtype)

    for step in range(1, n):
        parts[(rank - step - 1) % n] += exchange((rank - step) % n)
    for step in range(n - 1):
        parts[(rank - step - 1) % n] = exchange((rank - step) % n)
    return parts.reshape(x.shape)


def run(work: Callable[[int, int, Link], Any], n: int, transport: str) -> list[Any]:
    """`work(rank, n, link)` in n processes joined in a ring; what each returned, by rank.

    Args:
      work: a function of a module, for it is sent to other processes.
      transport: "pipes" or "zmq".
    """
    context = multiprocessing.get_context("spawn")
    ends = _ends(context, n, transport)
    results = context.SimpleQueue()
    members = [
        context.Process(target=_member, args=(work, r, n, ends[r], results), daemon=True)
        for r in range(n)
    ]
    for member in members:
        member.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + 2 * TIMEOUT
    try:
        while len(found) < n:
            if not results.empty():
                rank, value = results.get()
                if isinstance(value, Exception):
                    raise value
                found[rank] = value
            elif time.monotonic() > deadline or any(m.exitcode for m in members):
                raise TimeoutError("transport: a process ended or did not answer")
            else:
                time.sleep(0.002)
    finally:
        for member in members:
            member.terminate()
            member.join()
    return [found[r] for r in range(n)]


def _ends(context: Any, n: int, transport: str) -> Sequence[tuple]:
    if transport == "pipes":
        pipes = [context.Pipe(duplex=False) for _ in range(n)]  # of rank r: (receiver, sender)
        return [(pipes[r][1], pipes[r - 1][0]) for r in range(n)]
    if transport == "zmq":
        ports = [f"tcp://127.0.0.1:{port}" for port in _free_ports(n)]
        return [(ports[(r + 1) % n], ports[r]) for r in range(n)]
    raise UserError(f"transport: no {transport!r}; choose pipes or zmq")


def _free_ports(n: int) -> list[int]:
    import socket

    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def _member(work: Callable, rank: int, n: int, ends: tuple, results: Any) -> None:
    try:
        link = Sockets(*ends) if isinstance(ends[0], str) else Pipes(*ends)
        results.put((rank, work(rank, n, link)))
    except Exception as error:
        results.put((rank, error))
    time.sleep(TIMEOUT)  # what was sent last may still be under way; `run` ends this process


def timed(rank: int, n: int, link: Link) -> tuple[float, np.ndarray]:
    """(seconds of the best of three all-reduces, the sum) of `MEBIBYTES` of float32."""
    x = np.full(n * (MEBIBYTES * 2**20 // 4 // n), float(rank), np.float32)
    best, total = float("inf"), x
    for _ in range(3):
        begun = time.perf_counter()
        total = all_reduce(x, rank, n, link)
        best = min(best, time.perf_counter() - begun)
    return best, total[:1]


MEBIBYTES = 4


def main() -> None:
    """Times an all-reduce between processes of this machine."""
    n, transport = int(sys.argv[1]), sys.argv[2]
    seconds = max(seconds for seconds, _ in run(timed, n, transport))
    sent = 2 * (n - 1) / n * MEBIBYTES
    print(
        f"{n} processes over {transport}: {MEBIBYTES} MiB summed in {seconds * 1e3:.1f} ms, "
        f"{sent / seconds:.0f} MiB/s out of each"
    )


if __name__ == "__main__":
    main()
