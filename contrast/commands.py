"""The command of this layer. Importing this imports no jax and no PyTorch."""

from __future__ import annotations

import importlib

from tyro.conf import Positional

from jaxinfra.errors import UserError


def contrast(name: Positional[str | None] = None, /, *, list: bool = False) -> None:
    """Shows one measured contrast of JAX with PyTorch, or lists them all.

    Args:
      name: of the contrast; its measuring takes seconds to a minute.
      list: name all of them.
    """
    from contrast import NAMES
    from contrast.show import table

    if name is None or list:
        print(table(["contrast", "what it compares"], [[*row] for row in NAMES.items()]))
        return
    if (module := name.replace("-", "_")) not in NAMES:
        raise UserError(f"contrast: no {name!r}; there are {', '.join(NAMES)}")
    if module in ("randomness", "data_parallel"):
        from parallel.mesh import emulate

        emulate(8)
    importlib.import_module(f"contrast.{module}").main()
