"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxinfra.errors import UserError
from jaxinfra.files import writing


@contextlib.contextmanager
def new_folder(path: str | Path, size: int) -> Iterator[Path]:
    """Gives a temporary folder to write about `size` bytes into; on success it becomes `path`.

    Written beside its place, flushed, renamed: whatever goes wrong, `path` is as it was and the
    temporary folder is gone. Raises UserError when `path` is a file or a folder with something in
    it, when the disk is too small for `size` bytes or fills up while writing, and when the folder
    cannot be written.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already; remove it or choose another name")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(path, need=f": {size:,} bytes are needed"):
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{free:,} are free")
            yield temporary
            for entry in temporary.rglob("*"):
                _fsync(entry)
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
