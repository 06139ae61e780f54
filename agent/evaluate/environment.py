"""Environments of their own, for packages that pin what we must not: a folder of the cache each.

    python = environment("bfcl", ("bfcl-eval==2026.3.23", "mpmath==1.3.0"), dependencies=False)

An environment is made once for each Python and list of packages, in a folder that only gets its
name when all of it is there, so one that was interrupted is made again.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from jaxinfra.errors import UserError
from jaxinfra.weights.pull import cache_folder


def environment(name: str, packages: Sequence[str], *, dependencies: bool = True) -> Path:
    """The Python of an environment with `packages`, as pip names them, and unless told otherwise
    what they depend on. Raises UserError where pip cannot install them."""
    told = f"{sys.version_info[:2]} {dependencies} {' '.join(packages)}"
    mark = hashlib.sha256(told.encode()).hexdigest()[:12]
    folder = cache_folder() / "environments" / f"{name}-{mark}"
    ready, python = folder / "made", folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if ready.exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        options = ["--quiet", "--disable-pip-version-check", "--python", str(python), "install"]
        options += ["--no-compile", *([] if dependencies else ["--no-deps"])]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *options, *packages], capture_output=True, text=True
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise UserError(f"{name}: pip install {' '.join(packages)}: {''.join(last)}")
        ready.touch()
    return python
