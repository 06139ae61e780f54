"""Files that appear whole or not at all, and what goes wrong in writing told with its remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from jaxinfra.errors import UserError

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR,
                errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)  # fmt: skip


@contextlib.contextmanager
def writing(
    path: Path, elsewhere: str = "choose a folder on another disk", need: str = ""
) -> Iterator[None]:
    """Makes an OSError of the block that writes `path` a UserError: make room, or `elsewhere`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full{need} ({reason}); make room or {elsewhere}"
            ) from None
        raise UserError(f"{path}: cannot be written ({reason}); {elsewhere}") from None


def write_file(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, replacing what was there: beside its place, flushed, renamed.

    Raises UserError and leaves it alone where the disk is full or the folder cannot be written.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(path, "choose another place", need=f": {len(data):,} bytes are needed"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
