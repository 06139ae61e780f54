"""The engine's side of the server: one loop that takes messages, steps, and tells what came out.

In:  ("add", Request), ("abort", id), ("stop",).
Out: ("ready", Info), ("accepted", id), ("refused", id, status, why), ("outputs", [Output]),
     ("stats", EngineStats), ("died", why).
Cost: a message in and out of another process is some 50 microseconds, one out a step for all
requests together. This module imports no jax.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from decode.stats import Info

Message = tuple[Any, ...]
_STATS_EVERY = 0.25  # seconds


def drive(
    build: Callable[[], Any],
    receive: Callable[[bool], Message | None],
    send: Callable[[Message], None],
) -> None:
    """Builds an Engine and runs it until ("stop",) comes. Whatever it raises is sent, then raised.

    receive: the next message, or None; with True it may wait a while for one.
    """
    from decode.request import QueueFull

    engine = None
    try:
        engine = build()
        config = engine.config
        send(("ready", Info(config.max_len, config.page_size, config.pages)))
        told = 0.0
        while True:
            while (message := receive(not engine.has_work())) is not None:
                match message:
                    case ("add", request):
                        try:
                            engine.add(request)
                            send(("accepted", request.id))
                        except QueueFull as error:
                            send(("refused", request.id, 429, str(error)))
                        except ValueError as error:
                            send(("refused", request.id, 400, str(error)))
                    case ("abort", id):
                        engine.abort(id)
                    case ("stop",):
                        return
            outputs = engine.step() if engine.has_work() else []
            if outputs:
                send(("outputs", outputs))
            now = time.monotonic()
            if now - told >= _STATS_EVERY:
                send(("stats", engine.stats()))
                told = now
    except BaseException as error:
        send(("died", f"{type(error).__name__}: {error}"))
        raise
    finally:
        if engine is not None:
            engine.close()
