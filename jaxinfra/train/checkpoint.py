"""Checkpoints of a training run, by Orbax: written while training goes on, checked when read.

`FOLDER/STEP` holds the item `state` (the arrays) and the item `about` (what run it is, and a
checksum of the arrays' bits). A checkpoint gets its final name when all of it is on disk, and an
older one is removed after that. Cost of a save: one pass over the state on the device, one copy to
the host; the rest happens in another thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt

from jaxinfra.errors import UserError
from jaxinfra.train.step import TrainState
from jaxinfra.weights.orbax import Failed, run

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one folder, of one run: `about` says which (a dictionary for JSON).

    `how` tells what may change at a resume, though the bits are then not those of an uninterrupted
    run: a warning says so.
    """

    def __init__(
        self, folder: str | Path, about: Mapping[str, Any], keep: int, how: Mapping[str, Any]
    ) -> None:
        self.folder = Path(folder).absolute()
        self._about, self._how = json.loads(json.dumps([about, how]))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror})") from None
        self._failed = False
        # Its threads log tracebacks of what `save` and `finish` raise.
        self._orbax_log = logging.getLogger("absl")
        self._level = self._orbax_log.level
        self._orbax_log.setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, whole by its name, oldest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Begins to write `state`, which may be donated as soon as this returns.

        Raises UserError when the disk is too full for it, or was for the one before; those that
        were there stay.
        """
        step, size = int(state.step), sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        about = {"run": self._about, "how": self._how, "checksum": int(checksum(state))}
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise self._unwritten(step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
        )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._unwritten(step, error) from None

    def finish(self) -> None:
        """Waits until the last save is on disk; raises UserError when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(None, error) from None

    def close(self) -> None:
        """Ends the writing thread and removes what it could not write to its end.

        Call `finish` first to hear of that.
        """
        with contextlib.suppress(Exception):
            self._manager.close()
        self._orbax_log.setLevel(self._level)
        if self._failed:
            for half in self.folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(half, ignore_errors=True)

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        `like` gives shapes, dtypes and shardings. One that cannot be read, or whose bits are not
        those that were saved, is passed over with a warning and renamed to STEP.damaged. Raises
        UserError when all are damaged, and when a checkpoint is of another run than `about`.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                state = self._read(step, like)
            except Failed as error:
                reason = str(error).partition("\n")[0][:200]
                _log.warning("%s: damaged, passed over (%s)", self.folder / str(step), reason)
                continue
            for later in steps[steps.index(step) + 1 :]:
                os.replace(self.folder / str(later), _unused(self.folder / f"{later}.damaged"))
            self._manager.reload()  # or it would believe the renamed ones to be there
            return state
        if steps:
            raise UserError(
                f"{self.folder}: none of {len(steps)} checkpoints can be read; begin anew in "
                "another folder"
            )
        return None

    def _read(self, step: int, like: TrainState) -> TrainState:
        folder = self.folder / str(step)
        item = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = run(lambda checkpointer: checkpointer.restore(folder, item)).about
        try:
            theirs, how, expected = about["run"], about["how"], about["checksum"]
        except (TypeError, KeyError):
            raise Failed("its item `about` is not that of a training run") from None
        if other := _differences(theirs, self._about):
            raise UserError(f"{folder}: is of another run: {'; '.join(other)}; give what it had")
        item = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        state = run(lambda checkpointer: checkpointer.restore(folder, item)).state
        if int(checksum(state)) != expected:
            raise Failed("its arrays are not the ones that were saved")
        if other := _differences(how, self._how):
            _log.warning(
                "%s: %s; not the bits of an uninterrupted run from here on",
                folder, "; ".join(other),
            )  # fmt: skip
        return state

    def _unwritten(self, step: int | None, error: Exception) -> UserError:
        self._failed = True
        place = self.folder if step is None else self.folder / str(step)
        full = os.strerror(errno.ENOSPC)
        if full in str(error):
            kept = ", ".join(map(str, self.steps())) or "none"
            return UserError(
                f"{place}: the disk is full; make room and resume (checkpoints that are whole: "
                f"{kept})"
            )
        return UserError(f"{place}: cannot be written ({str(error).partition(chr(10))[0]})")


@jax.jit
def checksum(tree: Any) -> UInt[Array, ""]:
    """The sum modulo 2^32 of all 32-bit words of a tree's arrays, each mixed with its place.

    Mixing is one to one at every place, so one changed word always shows; words that changed places
    show but for chances of 2^-32.
    """
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        place = jnp.arange(bits.size, dtype=jnp.uint32) + jnp.uint32(number * 7919)
        mixed = bits ^ (place * jnp.uint32(0x9E3779B1))
        for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's last steps
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(odd)
        total += jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
    return total


def _differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """What differs between two dictionaries for JSON, one sentence a value."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [
            line
            for key in keys
            for line in _differences(theirs.get(key), ours.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if theirs == ours else [f"{name} was {theirs!r}, now {ours!r}"]


def _unused(path: Path) -> Path:
    number = 1
    while path.exists():
        path = path.with_suffix(f".damaged-{(number := number + 1)}")
    return path
