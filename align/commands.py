"""The command `jaxinfra align`: one subcommand a method, each a dataclass that runs itself.

To add some, add their dictionary to `COMMANDS`: a name, and a frozen dataclass whose fields become
flags, whose docstring is its help, and whose `__call__` does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Union

from tyro.conf import arg, subcommand

from align.online_commands import ONLINE
from align.trainer_config import METHODS

COMMANDS: dict[str, Callable[..., Callable[[], None]]] = {**METHODS, **ONLINE}

_Command: Any = Union[  # noqa: UP007 (of a number that is not known here)
    tuple(Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items())
]


def align(command: Annotated[_Command, arg(name="")]) -> None:
    """Aligns a model: by demonstrations, preferences or rewards; one subcommand a method."""
    command()
