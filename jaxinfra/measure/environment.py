"""The conditions of a measurement: versions, machine, flags; nothing that names a person."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "triton", "transformers")


def environment() -> dict[str, Any]:
    """Conditions as a flat dictionary for JSON; the git fields are None outside a checkout."""
    from jaxinfra.hardware.detect import cpu_name, usable_cpus

    devices = jax.devices()
    commit = _git("rev-parse", "--short", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "uncommitted changes": None if status is None else bool(status),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "cpu": f"{cpu_name()}, {usable_cpus()} usable",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES if _version(name)},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "matmul precision": str(
            getattr(jax.config, "jax_default_matmul_precision", None) or "default"
        ),
        "torch loaded": "torch" in sys.modules,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
