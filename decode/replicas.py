"""Servers on a Ray cluster behind one address: one a machine, or one a GPU.

    jaxinfra serve MODEL --replicas 2

An actor keeps one server alive, at one address of its machine. A server that ends is started there
again; meanwhile the router (`decode.route`) sends requests to the others, those included that it
had no byte of an answer to. An actor is lost with its machine, and its address stays unhealthy.
Needs `pip install 'jaxinfra[ray]'`, and this package on every machine of the cluster.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxinfra.errors import UserError

Serve = Callable[..., None]  # called with host and port, in a process of its own: it must pickle
_PAUSE = 1.0  # seconds before a server that ended is started again


class _Replica:
    """What runs on a machine of the cluster."""

    def __init__(self, serve: Serve, host: str) -> None:
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
        self._serve, self._address = serve, (host, port)
        self._process: Any = None
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def _keep_alive(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        while True:
            self._process = spawn.Process(target=_child, args=(self._serve, *self._address))
            self._process.start()
            self._process.join()
            time.sleep(_PAUSE)

    def url(self) -> str:
        return "http://{}:{}".format(*self._address)

    def process(self) -> int | None:
        return self._process.pid if self._process is not None else None


def _child(serve: Serve, host: str, port: int) -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # it drains, and ends its engine

    threading.Thread(target=watch, daemon=True).start()
    serve(host=host, port=port)


def start(serve: Serve, count: int, *, host: str | None = None, **options: Any) -> list[Any]:
    """`count` actors; `options` are Ray's for each (num_cpus, num_gpus). `url` tells the address.

    host: to listen on; by default that of each machine in the cluster.
    """
    try:
        import ray
    except ImportError:
        raise UserError("serve: replicas run on Ray: pip install 'jaxinfra[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)

    class Replica(_Replica):
        def __init__(self) -> None:
            super().__init__(serve, host or ray.util.get_node_ip_address())

    return [ray.remote(**({"num_cpus": 1} | options))(Replica).remote() for _ in range(count)]


def run(serve: Serve, count: int, *, host: str, port: int, gpus: int) -> None:
    """Serves until told to end; then the servers drain."""
    import uvicorn

    from decode.route import Prefix, router

    actors = start(serve, count, num_gpus=gpus)
    import ray

    urls = ray.get([actor.url.remote() for actor in actors])
    print(f"{', '.join(urls)} behind http://{host}:{port}", flush=True)
    try:
        uvicorn.run(router(urls, Prefix()), host=host, port=port, log_level="warning")
    finally:
        for actor in actors:
            ray.kill(actor)
