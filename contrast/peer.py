"""PyTorch, where it is installed, and one clear error where it is not."""

from __future__ import annotations

import importlib
from typing import Any

from jaxinfra.errors import UserError


def torch() -> Any:
    """The module `torch`; raises UserError with what to install."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError("PyTorch is not installed: pip install 'jaxinfra[torch]'") from None


def load(name: str) -> Any:
    """A module of PyTorch, or of another package that is not always there, by its full name."""
    torch()
    return importlib.import_module(name)


def compile_afresh() -> Any:
    """torch, with nothing compiled before: caches of Dynamo emptied and those on disk unused."""
    module = torch()
    module.compiler.reset()
    load("torch._inductor.config").fx_graph_cache = False
    load("torch._functorch.config").enable_autograd_cache = False
    return module
