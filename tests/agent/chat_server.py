"""A chat-completions server on 127.0.0.1, with the habits and the faults of real ones."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Server(http.server.ThreadingHTTPServer):
    """Answers with the entries of `turns` in order, or with what `answer` says to a request; `seen`
    holds the requests and their headers.

    A turn is {"content": ...} or {"tool_calls": [...]}, or a fault: {"status": 503, "after": "0"},
    {"cut": n} (the stream ends after n chunks, without its end).
    """

    daemon_threads = True

    def __init__(self, turns: list[dict[str, Any]], answer: Answer | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer or (lambda body: turns.pop(0))
        self.seen: list[dict[str, Any]] = []
        self.headers: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.headers.append(self.headers)
        turn = self.server.answer(body)
        if "status" in turn:
            data = json.dumps({"error": {"message": "no"}}).encode()
            self.send_response(turn["status"])
            self.send_header("retry-after", turn.get("after", "0"))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110,
                 "prompt_tokens_details": {"cached_tokens": 60}}  # fmt: skip
        message = {"role": "assistant", "content": turn.get("content")}
        finish = "stop"
        if "tool_calls" in turn:
            message["tool_calls"], finish = turn["tool_calls"], "tool_calls"
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish}
            self._send("application/json", [json.dumps({**head, "choices": [choice],
                                                        "usage": usage})])  # fmt: skip
            return
        chunks: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        text = message["content"] or ""
        chunks += [{"content": text[i : i + 4]} for i in range(0, len(text), 4)]
        for index, call in enumerate(turn.get("tool_calls", ())):
            function = call["function"]
            chunks.append({"tool_calls": [{"index": index, "id": call["id"], "type": "function",
                           "function": {"name": function["name"], "arguments": ""}}]})  # fmt: skip
            arguments = function["arguments"]
            for i in range(0, len(arguments), 3):
                piece = {"index": index, "function": {"arguments": arguments[i : i + 3]}}
                chunks.append({"tool_calls": [piece]})
        head["object"] = "chat.completion.chunk"
        bodies: list[dict[str, Any]] = [
            {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            for delta in chunks
        ]
        bodies.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        bodies.append({**head, "choices": [], "usage": usage})
        if "cut" in turn:
            bodies = bodies[: turn["cut"]]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in bodies]
        self._send("text/event-stream", lines + ([] if "cut" in turn else ["data: [DONE]\n\n"]))

    def _send(self, kind: str, parts: list[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        with contextlib.suppress(OSError):
            for part in parts:
                self.wfile.write(part.encode())
                self.wfile.flush()

    def log_message(self, *_) -> None:
        pass


def tool_call(id: str, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)}}  # fmt: skip


@contextlib.contextmanager
def serving(*turns: dict[str, Any], answer: Answer | None = None) -> Iterator[Server]:
    with Server(list(turns), answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
