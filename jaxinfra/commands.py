"""The commands of the ground. Importing this imports no jax: each command does when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    pass


def pull(name: Positional[str], /, *, offline: bool = False) -> None:
    """Fetches a model and prints where it lies.

    Args:
      name: a short name (smollm2-135m), a Hugging Face id (Qwen/Qwen3-0.6B) or a local path.
      offline: use only what is on this machine, and say what is missing.
    """
    from jaxinfra.weights.pull import pull as fetch

    print(fetch(name, offline=offline))
