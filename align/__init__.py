"""RL and alignment: losses held to TRL's numbers, whole RL steps in one program, and trainers.

Importing this package imports no jax (reward workers and servers need none); the names below do
when they are first used. One answer to many prompts is `align.rollout.rollout`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.config import RLConfig
    from align.host_loop import HostLoop
    from align.rollout import Rollout
    from align.step import RLState, create, make_parts, make_run, make_step
    from align.tasks import TASKS

__all__ = [
    "TASKS",
    "HostLoop",
    "RLConfig",
    "RLState",
    "Rollout",
    "create",
    "make_parts",
    "make_run",
    "make_step",
]

_HOME = {"TASKS": "tasks", "HostLoop": "host_loop", "RLConfig": "config", "Rollout": "rollout"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'align' has no attribute {name!r}")
    return getattr(importlib.import_module(f"align.{_HOME.get(name, 'step')}"), name)
