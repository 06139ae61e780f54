"""Downloading one large file: resumed where it broke off, checked, and in place only when whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxinfra.errors import UserError
from jaxinfra.files import CANNOT_WRITE, writing

_TIMEOUT = 15.0  # seconds without a byte
_TRIES = 5  # in a row without a new byte
_BLOCK = 1 << 18


class _BrokenOff(Exception):
    """The connection ended before the file did."""


def fetch(url: str, file: Path, sha256: str | None, *, progress: bool, pause: float = 0.5) -> None:
    """Downloads `url` (http, https or file) to `file`, with a progress bar on stderr.

    What has arrived is kept as `file`.part and a later call goes on from there where the server
    knows the Range header. `pause` is the wait before a second try, in seconds; it doubles. Raises
    UserError when the server refuses, is out of reach or breaks off for good, when the disk fills
    up, and when the SHA-256 differs (then the part is removed).
    """
    part = file.with_name(file.name + ".part")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        resumed = _size(part) > 0
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
                   TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            _until_whole(url, part, bar, pause)
        if sha256 and digest(part) != sha256:
            part.unlink()
            if resumed:  # the old part may be of another file
                return fetch(url, file, sha256, progress=progress, pause=pause)
            raise UserError(
                f"{file.name}: what was downloaded has another SHA-256 than {sha256}; it was "
                "removed, try again (a proxy may have changed it)"
            )
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, file)


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _until_whole(url: str, part: Path, bar: Progress, pause: float) -> None:
    task = bar.add_task(part.name.removesuffix(".part"), total=None)
    tries = 0
    while True:
        before = _size(part)
        try:
            return _continue(url, part, bar, task)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing is left to send, or the part is too long
                return
            if error.code < 500:
                raise UserError(f"{part.name}: the server answers {error.code}") from None
            reason = f"the server answers {error.code}"
        except (OSError, http.client.HTTPException, _BrokenOff) as error:
            if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
                raise
            reason = str(error)
        tries = 1 if _size(part) > before else tries + 1
        if tries == _TRIES:
            raise UserError(
                f"{part.name}: the download broke off ({reason}); run it again to go on from byte "
                f"{_size(part):,}"
            )
        time.sleep(pause * 2 ** (tries - 1))


def _continue(url: str, part: Path, bar: Progress, task: TaskID) -> None:
    have = _size(part)
    headers = {"User-Agent": "jaxinfra"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
    ) as r:
        if have and not r.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the whole file comes again
        length = r.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar.update(task, total=total, completed=have)
        with open(part, "ab" if have else "wb") as stream:
            while block := r.read(_BLOCK):
                stream.write(block)
                bar.advance(task, len(block))
    if total and _size(part) < total:
        raise _BrokenOff(f"{_size(part):,} of {total:,} bytes came")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
