"""Model weights as an Orbax checkpoint: JAX's own sharded format, with the configuration beside.

A folder of two items: `params`, the arrays of `Params` keyed by dotted path, and `config`, the
dictionary of a Hugging Face config.json. Checkpoints of a training run are something else: they
also hold the optimiser.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params, abstract
from jaxinfra.weights.files import new_folder
from jaxinfra.weights.names import leaves

_CHUNK = 2**20  # bytes: what is read is there twice, but by chunks
_LAST_READS = 0.1  # seconds; reads under way when another one fails end within them


class Failed(Exception):
    """Orbax could not read or write; the message is its own."""


def save(path: str | Path, params: Params, config: ModelConfig) -> None:
    """Writes `params` and `config` to the folder `path`, which appears whole or not at all.

    Raises UserError when `path` exists with something in it, and when the disk is full.
    """
    arrays = dict(zip((name for name, _ in leaves(config)), jax.tree.leaves(params), strict=True))
    size = sum(array.nbytes for array in arrays.values())
    chunked = {
        name: ocp.SaveArgs(chunk_byte_size=_CHUNK if _divides(array.shape) else None)
        for name, array in arrays.items()
    }
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave(arrays, save_args=chunked),
        config=ocp.args.JsonSave(config.to_hf()),
    )
    with new_folder(path, size) as new:
        whole = new / "whole"  # orbax writes beside it and renames; that must stay inside `new`
        try:
            run(lambda checkpointer: checkpointer.save(whole, items))
        except Failed as error:
            full = os.strerror(errno.ENOSPC)
            if full in str(error):
                raise OSError(errno.ENOSPC, full) from None
            raise OSError(errno.EIO, str(error).partition("\n")[0]) from None
        for entry in list(whole.iterdir()):
            entry.rename(new / entry.name)
        whole.rmdir()


def read_config(path: str | Path) -> ModelConfig:
    """The configuration in the checkpoint `path`."""
    path = Path(path).absolute()
    if not (path / "_CHECKPOINT_METADATA").is_file():
        raise UserError(f"{path}: not a finished Orbax checkpoint; give another folder")
    for item in ("params", "config"):
        if not (path / item).is_dir():
            raise UserError(
                f"{path}: this Orbax checkpoint has no item {item!r}, so it is not one of model "
                "weights written by jaxinfra; give another folder"
            )
    try:
        item = ocp.args.Composite(config=ocp.args.JsonRestore())
        raw = run(lambda checkpointer: checkpointer.restore(path, item)).config
    except Failed as error:
        raise _corrupt(path, error) from None
    try:
        return ModelConfig.from_hf(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load(path: str | Path, dtype: Any, sharding: Any = None) -> Params:
    """Reads the weights of the checkpoint `path` in `dtype`.

    `sharding`: None for the default device, one `jax.sharding.Sharding` for all arrays, or a tree
    of them like Params; each device reads its own part. One array is read at a time, the largest
    first, while there is least beside it: host memory grew by 1.12 to 1.21 times a model of 534 MB
    that `save` had written by chunks, and by more where an array is one chunk.
    Raises UserError naming the folder when it is no such checkpoint or a damaged one, and when
    arrays are not those of its config.
    """
    path = Path(path).absolute()
    config = read_config(path)
    shapes = abstract(config, dtype)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.leaves(jax.tree.broadcast(sharding, shapes))

    def restore(checkpointer: ocp.Checkpointer) -> list[jax.Array]:
        arrays: dict[str, jax.Array] = {}
        every = zip(leaves(config), places, strict=True)
        for (name, shape), place in sorted(every, key=lambda one: -math.prod(one[0][1])):
            wanted = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)}
            how = {name: ocp.ArrayRestoreArgs(sharding=place, global_shape=shape, dtype=dtype)}
            item = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
            restored = checkpointer.restore(path, ocp.args.Composite(params=item))
            arrays[name] = restored.params[name]
            _give_back()
        return [arrays[name] for name, _ in leaves(config)]

    try:
        return jax.tree.unflatten(jax.tree.structure(shapes), run(restore))
    except Failed as error:
        raise _corrupt(path, error) from None


def run(action: Callable[[ocp.Checkpointer], Any]) -> Any:
    """What `action` gives; raises Failed in place of whatever orbax raises.

    On a failure orbax's threads and abandoned futures print tracebacks of their own, some of them
    only when collected; they are muted, for the exception says it all.
    """
    muted = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in muted], sys.unraisablehook
    for logger in muted:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return action(checkpointer)
    except Exception as error:
        reason = str(error)
        time.sleep(_LAST_READS)
    finally:
        with warnings.catch_warnings(action="ignore"):
            gc.collect()
        for logger, level in zip(muted, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook
    raise Failed(reason)


def _divides(shape: Sequence[int]) -> bool:
    """Whether orbax, whose chunks are whole fractions of an axis, finds some of about _CHUNK.

    Of a prime number of rows it would make one chunk a row.
    """
    return all(n % 64 == 0 for n in shape if n > 1024)


def _give_back() -> None:
    """Hands freed memory to the system, where glibc would keep some for later."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: damaged checkpoint, or its arrays are not those of its config "
        f"({str(error).partition(chr(10))[0][:200]}); copy or save it again"
    )
