"""A file of requests through a server, in OpenAI's batch format: resumable, ordered, atomic.

    jaxinfra batch in.jsonl out.jsonl --url http://127.0.0.1:8000

Lines in: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}; lines out:
{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}, in the order of the
file that went in. Every answer is on disk, in out.jsonl.partial, before the next request takes its
place; the same command goes on from there, and out.jsonl appears once, whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from jaxinfra.errors import UserError
from jaxinfra.files import write_file

_PATHS = ("/v1/chat/completions", "/v1/completions")
_AGAIN = (0, 408, 429, 500, 502, 503, 504)  # 0: no answer came


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read(path: Path) -> list[Line]:
    """The requests of a file. Raises UserError naming the line at fault."""
    lines: dict[str, Line] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            line = Line(row["custom_id"], row["url"], row["body"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a batch's line ({error!r})") from None
        if not isinstance(line.custom_id, str) or not isinstance(line.body, dict):
            raise UserError(f"{path}:{number}: custom_id must be text, and body an object")
        if row.get("method", "POST") != "POST" or line.url not in _PATHS:
            raise UserError(f"{path}:{number}: only POST to {' or '.join(_PATHS)}")
        if line.body.get("stream"):
            raise UserError(f"{path}:{number}: a batch cannot stream; leave stream out")
        if line.custom_id in lines:
            raise UserError(f"{path}:{number}: custom_id {line.custom_id!r} is there twice")
        lines[line.custom_id] = line
    if not lines:
        raise UserError(f"{path}: no request in it")
    return list(lines.values())


async def run(
    source: Path, out: Path, *, url: str, concurrency: int = 32, key: str = "", retries: int = 6,
    pause: float = 1.0, timeout: float = 3600.0,
) -> dict[str, int]:  # fmt: skip
    """Answers every line of `source` and writes `out`. Returns {"resumed", "answered", "failed"}.

    A refusal for want of room, or a broken connection, is tried again up to `retries` times, after
    the server's Retry-After or `pause` seconds, doubled each time. Raises UserError when the
    partial file belongs to another source.
    """
    lines = read(source)
    partial = out.with_name(out.name + ".partial")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    done = _resume(partial, digest)
    resumed = len(done)
    todo = iter([line for line in lines if line.custom_id not in done])
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=None)
    with open(partial, "a", encoding="utf-8") as journal:
        if not journal.tell():
            journal.write(json.dumps({"source": digest}) + "\n")
        async with httpx2.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, limits=limits,
            timeout=timeout,
        ) as client:  # fmt: skip

            async def worker() -> None:
                for line in todo:
                    row = await _answer(client, line, retries, pause)
                    done[line.custom_id] = row
                    journal.write(json.dumps(row) + "\n")
                    journal.flush()
                    await asyncio.to_thread(os.fsync, journal.fileno())

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())
    rows = [done[line.custom_id] for line in lines]
    write_file(out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    partial.unlink()
    failed = sum(not _fine(row) for row in rows)
    return {"resumed": resumed, "answered": len(rows) - failed, "failed": failed}


def _fine(row: dict[str, Any]) -> bool:
    return row["response"] is not None and row["response"]["status_code"] == 200


def _resume(partial: Path, digest: str) -> dict[str, dict[str, Any]]:
    """The answers that an earlier run left, but for failures; a last line cut short is cut off."""
    if not partial.exists():
        return {}
    raw = partial.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    rows = [json.loads(line) for line in whole.splitlines()]
    if rows and rows[0].get("source") != digest:
        raise UserError(f"{partial}: from another source; remove it, or give another output")
    if whole != raw:
        write_file(partial, whole)
    return {row["custom_id"]: row for row in rows[1:] if _fine(row)}


async def _answer(
    client: httpx2.AsyncClient, line: Line, retries: int, pause: float
) -> dict[str, Any]:
    status, body, id, why = 0, None, "", ""
    for attempt in range(retries + 1):
        wait = pause * 2**attempt
        try:
            response = await client.post(line.url, json=line.body)
            status, body = response.status_code, response.json()
            id = response.headers.get("x-request-id", "")
            wait = float(response.headers.get("retry-after", wait))
        except (httpx2.HTTPError, ValueError) as error:
            status, why = 0, f"{type(error).__name__}: {error}"
        if status not in _AGAIN or attempt == retries:
            break
        await asyncio.sleep(wait)
    error = None if status else {"code": "no_answer", "message": why}
    answer = {"status_code": status, "request_id": id, "body": body} if status else None
    name = hashlib.sha256(line.custom_id.encode()).hexdigest()[:24]
    return {"id": f"batch_req_{name}", "custom_id": line.custom_id, "response": answer,
            "error": error}  # fmt: skip


def told(counts: dict[str, int], out: Path) -> str:
    """What to print of a batch that is done."""
    parts: Sequence[str] = [f"{value} {name}" for name, value in counts.items() if value]
    return f"{out}: {', '.join(parts)}"
