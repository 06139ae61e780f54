"""A reward as a server: scorers of their own machine, own environment, own pace.

    python -m align.reward_server MODULE:FUNCTION --port 8100

FUNCTION takes a list of `align.rewards.Sample` and gives as many numbers (or None). POST / takes
{"samples": [{"prompt", "answer", "stopped", "problem"}, ...]} and answers {"rewards": [...]}; an
exception is status 500 with its text, a body that is no such JSON status 400.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from align.rewards import Sample, sample_of
from jaxinfra.errors import UserError

Function = Callable[[Sequence[Sample]], Sequence[float | None]]


def make_server(function: Function, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server that is bound and not running yet: call `serve_forever`, end it by `shutdown`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                samples = [sample_of(data) for data in json.loads(body)["samples"]]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                return self._tell(400, {"error": f"not a batch of samples: {error!r}"})
            try:
                rewards = [_number(value) for value in function(samples)]
            except Exception as error:
                return self._tell(500, {"error": f"{type(error).__name__}: {error}"})
            self._tell(200, {"rewards": rewards})

        def _tell(self, status: int, data: dict[str, Any]) -> None:
            body = json.dumps(data, allow_nan=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def serve(function: str, /, *, host: str = "127.0.0.1", port: int = 8100) -> None:
    """Answers until it is stopped.

    Args:
      function: MODULE:FUNCTION.
    """
    module, _, name = function.partition(":")
    found: Any = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise UserError(f"reward server: {function!r}: give MODULE:FUNCTION, as rewards:length")
    server = make_server(found, host, port)
    print(f"{function} on http://{host}:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    import tyro

    tyro.cli(serve)
