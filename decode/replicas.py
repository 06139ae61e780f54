"""Servers on a Ray cluster behind one address: one a machine, or one a GPU.

    jaxinfra serve MODEL --replicas 2

An actor keeps one server alive, at one address of its machine. A server that ends is started there
again, unless it ends again and again (`decode.server.restarts`), which is told; meanwhile the
router (`decode.route`) sends requests to the others, those included that it had no byte of an
answer to. An actor is lost with its machine, and its address stays unhealthy.

On the router's machine servers listen on 127.0.0.1. On others they listen on that machine's address
in the cluster, where whoever reaches it can ask them what they ask for: give them keys, or keep
strangers off that network. Needs `pip install 'jaxinfra[ray]'`, and this package on every machine
of the cluster.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from decode.server.restarts import Restarts
from jaxinfra.errors import UserError

Serve = Callable[..., None]  # called with host and port, in a process of its own: it must pickle
_PAUSE = 1.0  # seconds before a server that ended is started again
log = logging.getLogger("jaxinfra.serve")


class _Replica:
    """What runs on a machine of the cluster."""

    def __init__(self, serve: Serve, host: str) -> None:
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
        self._serve, self._address = serve, (host, port)
        self._process: Any = None
        self._why = ""  # it ended last
        self._keeper = threading.Thread(target=self._keep_alive, daemon=True)
        self._keeper.start()

    def _keep_alive(self) -> None:
        spawn, restarts = multiprocessing.get_context("spawn"), Restarts()
        while True:
            told, tell = spawn.Pipe(duplex=False)
            self._process = spawn.Process(
                target=_child, args=(self._serve, *self._address, os.getpid(), tell)
            )
            self._process.start()
            self._process.join()
            self._why = told.recv() if told.poll() else f"exit code {self._process.exitcode}"
            if not restarts.another():
                return
            time.sleep(_PAUSE)

    def url(self) -> str:
        return "http://{}:{}".format(*self._address)

    def process(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def ended(self) -> str:
        """Waits until no server will be started any more; why the last one ended."""
        self._keeper.join()
        return self._why


def _child(serve: Serve, host: str, port: int, parent: int, tell: Connection) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # it drains, and ends its engine

    threading.Thread(target=watch, daemon=True).start()
    try:
        serve(host=host, port=port)
    except Exception as error:
        tell.send(f"{type(error).__name__}: {error}")
        raise


def start(serve: Serve, count: int, **options: Any) -> list[Any]:
    """`count` actors; `options` are Ray's for each (num_cpus, num_gpus). `url` tells the address.

    On a machine that does not have to be reached from outside, 127.0.0.1.
    """
    ray = _ray()
    here = ray.util.get_node_ip_address()

    class Replica(_Replica):
        def __init__(self) -> None:
            own = ray.util.get_node_ip_address()
            super().__init__(serve, "127.0.0.1" if own == here else own)

    # One call may wait in `ended` while others ask.
    options = {"num_cpus": 1, "max_concurrency": 4} | options
    return [ray.remote(**options)(Replica).remote() for _ in range(count)]


def run(serve: Serve, count: int, *, host: str, port: int, gpus: int | None, each: int) -> None:
    """Serves until told to end; then the servers drain.

    gpus: of a server; by default `each` where the cluster has some. Raises UserError where those
    are too few, and when the last server has been given up.
    """
    import uvicorn

    from decode.route import Prefix, router

    ray = _ray()
    if gpus is None:
        gpus = shared(int(ray.cluster_resources().get("GPU", 0)), count, each)
    actors = start(serve, count, num_gpus=gpus)
    urls = ray.get([actor.url.remote() for actor in actors])
    print(f"{', '.join(urls)} behind http://{host}:{port}", flush=True)
    config = uvicorn.Config(router(urls, Prefix()), host=host, port=port, log_level="warning")
    server, given_up, ending = uvicorn.Server(config), [], threading.Event()

    def listen() -> None:
        left = {actor.ended.remote(): url for actor, url in zip(actors, urls, strict=True)}
        while left:
            (one,), _ = ray.wait([*left])
            try:
                why = ray.get(one)
            except ray.exceptions.RayError as error:
                why = f"its machine or actor is lost: {type(error).__name__}"
            if ending.is_set():
                return
            given_up.append(why)
            log.error("the server at %s is given up: %s", left.pop(one), why)
        server.should_exit = True

    threading.Thread(target=listen, daemon=True).start()
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    finally:
        ending.set()
        for actor in actors:
            ray.kill(actor)
    if len(given_up) == count:
        raise UserError(f"serve: every replica is gone, the last one: {given_up[-1]}")


def shared(there: int, count: int, each: int) -> int:
    """GPUs of a server, of those that are `there`: `each`, or none. Raises UserError."""
    if 0 < there < count * each:
        raise UserError(
            f"serve: {count} replicas of {each} GPUs; the cluster has {there}: fewer replicas, "
            "or gpus 0 for servers without"
        )
    return each if there else 0


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("serve: replicas run on Ray: pip install 'jaxinfra[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return ray
