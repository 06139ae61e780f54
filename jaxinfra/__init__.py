"""The AI-infrastructure stack in JAX: the ground that every layer stands on.

    import jaxinfra
    model = jaxinfra.load("smollm2-135m")
    logits = model(tokens)                       # [B, T] -> [B, T, V]

Importing this package imports neither jax nor numpy; the names below do when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxinfra.errors import UserError

if TYPE_CHECKING:
    from jaxinfra.loading import Model, load
    from jaxinfra.model.config import ModelConfig
    from jaxinfra.weights.pull import pull

__version__ = "0.1.0"
__all__ = ["Model", "ModelConfig", "UserError", "load", "pull"]

_HOME = {
    "Model": "jaxinfra.loading",
    "load": "jaxinfra.loading",
    "ModelConfig": "jaxinfra.model.config",
    "pull": "jaxinfra.weights.pull",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxinfra' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
