"""The conditions of a measurement: versions, machine, flags; nothing that names a person."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_OURS = ("jax", "jaxlib", "flax", "optax", "numpy")
_PEERS = ("torch", "triton", "transformers")  # conditions only of a process that loaded them
_FOLDERS = re.compile(r"(?<![\w.~/])~?/(?:[^/\s=:,]+/)*")  # of an absolute path, up to its name


def environment() -> dict[str, Any]:
    """Conditions as a flat dictionary for JSON; the git fields are None outside a checkout.

    Folders of absolute paths are left out of the command line and of XLA_FLAGS.
    """
    from jaxinfra.hardware.detect import cpu_name, usable_cpus

    devices = jax.devices()
    commit, changed = _checkout()
    packages = _OURS + tuple(name for name in _PEERS if name in sys.modules)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command line": " ".join(map(without_folders, sys.orig_argv)),
        "commit": commit,
        "uncommitted changes": changed,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "backend": " ".join(devices[0].client.platform_version.split()),
        "cpu": f"{cpu_name()}, {usable_cpus()} usable",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages if _version(name)},
        "XLA_FLAGS": without_folders(os.environ.get("XLA_FLAGS", "")),
        "matmul precision": str(
            getattr(jax.config, "jax_default_matmul_precision", None) or "default"
        ),
    }


def without_folders(text: str) -> str:
    """`text` with every absolute path cut to its last name."""
    return _FOLDERS.sub("", text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkout() -> tuple[str | None, bool | None]:
    """Commit and whether tracked files changed; None where git does not track this very file."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "--short=12", "HEAD"), None if status is None else bool(status)


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
