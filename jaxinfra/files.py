"""Files that appear whole or not at all: written beside their place, flushed, renamed."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from jaxinfra.errors import UserError


def write_file(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, replacing what was there; raises UserError and leaves it alone
    where the disk is full or the folder cannot be written."""
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"the disk is full: {len(data):,} bytes are needed" if full else error.strerror
        raise UserError(f"{path}: cannot be written ({reason}); choose another place") from None
    finally:
        temporary.unlink(missing_ok=True)
