"""A file server on 127.0.0.1 with the faults of real ones: cut connections, no Range, refusals."""

import contextlib
import http.server
import threading
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path; `seen` holds the Range header of each request."""

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.seen: list[str | None] = []
        self.ranges = True  # whether it knows the Range header
        self.cut_after: list[int] = []  # bytes sent before the connection is cut, one a request
        self.status: list[int] = []  # refusals, one a request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/model-1.0-py3-none-any.whl"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.seen.append(asked)
        if self.server.status:
            self.send_error(self.server.status.pop(0))
            return
        body, first = self.server.content, 0
        if asked and self.server.ranges:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        sent = body[first:]
        if self.server.cut_after:
            sent = sent[: self.server.cut_after.pop(0)]
        self.wfile.write(sent)

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[Server]:
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
