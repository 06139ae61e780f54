"""Checkpoints of a run by reward: the trainer's state by Orbax, the host's side beside it.

`FOLDER/STEP` is `jaxinfra.train.checkpoint`'s: parameters, optimiser, controllers, seed, cursor.
`FOLDER/host/STEP.npz` holds what only the host knows: the buffer, the place in the schedule, work
under way. It is on disk before the other gets its final name, so a step that is whole has both.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from align.step import RLState
from jaxinfra.errors import UserError
from jaxinfra.files import write_file
from jaxinfra.train.checkpoint import Checkpoints

_log = logging.getLogger(__name__)


class RunCheckpoints:
    """The newest `keep` checkpoints of the run that `about` describes (a dictionary for JSON)."""

    def __init__(self, folder: str | Path, about: Mapping[str, Any], *, keep: int = 2) -> None:
        self._states = Checkpoints(folder, about, keep, {})
        self._host = Path(folder).absolute() / "host"
        self.failed = 0
        """Checkpoints that could not be written, as on a full disk: the run goes on without."""

    def save(self, state: RLState, host: Mapping[str, np.ndarray] | None = None) -> bool:
        """Writes a checkpoint, or says why not in the log; those before stay."""
        step = int(state.step)
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **(host or {}))
        try:
            write_file(self._host / f"{step}.npz", file.getvalue())
            self._states.save(state)  # pyright: ignore[reportArgumentType] (it has a step)
            self._states.finish()
        except UserError as error:
            _log.warning("%s; the run goes on", error)
            self.failed += 1
            return False
        kept = {f"{number}.npz" for number in self._states.steps()}
        for old in self._host.glob("*.npz"):
            if old.name not in kept:
                old.unlink()
        return True

    def restore(self, like: RLState) -> tuple[RLState, dict[str, np.ndarray]] | None:
        """The newest that is whole, or None where there is none; `like` has its arrays' places.

        Raises UserError where it is of another run, or all are damaged.
        """
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        state: Any = self._states.restore(shapes)
        if state is None:
            return None
        file = self._host / f"{int(state.step)}.npz"
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return state, {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file}: cannot be read ({error}); remove {file.stem} to go on from the one before"
            ) from None

    def close(self) -> None:
        """Ends the writing thread."""
        self._states.close()
