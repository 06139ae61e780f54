"""Building `Params` from a checkpoint one array at a time.

Memory: each stacked array is allocated once in the target dtype, filled in place a block of rows at
a time, handed to the device and released before the next is begun. On a CPU the device takes the
memory over without a copy (it is aligned to 64 bytes), so the peak is the model itself; on an
accelerator the host holds one array.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params, abstract
from jaxinfra.weights.names import Tensor, leaves

# A block is read, converted and transposed at once; 128 rows stay within the processor's cache and
# transpose at 1.5 GB/s (bfloat16, 2,048 columns, one core), whole matrices at 0.3 GB/s.
_ROWS = 128

ReadRows = Callable[[Tensor, int, int], np.ndarray]


def check(
    where: Any, tensors: Iterable[Tensor], found: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, ...]:
    """The tensors a config asks for, held against names and shapes `found` in the file `where`.

    Raises UserError on the first that is missing or of another shape, and on one too many.
    """
    known: dict[str, Tensor] = {}
    for tensor in tensors:
        if tensor.name not in found:
            raise UserError(
                f"{where}: tensor {tensor.name} is missing: the checkpoint is incomplete or the "
                "config belongs to another model; fetch the folder again"
            )
        if found[tensor.name] != tensor.shape:
            raise UserError(
                f"{where}: tensor {tensor.name} has shape {list(found[tensor.name])}, the config "
                f"says {list(tensor.shape)}; the config does not belong to these weights"
            )
        known[tensor.name] = tensor
    if extra := found.keys() - known.keys():
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(
            f"{where}: tensor {min(extra)}{more} has no place in the model that the config "
            "describes; the config does not belong to these weights"
        )
    return tuple(known.values())


def assemble(
    config: ModelConfig,
    tensors: Iterable[Tensor],
    dtype: Any,
    read_rows: ReadRows,
    sharding: Any = None,
) -> Params:
    """The parameters of `config` in `dtype`, filled by `read_rows`.

    `read_rows(tensor, start, stop)` gives rows start:stop of a tensor of the file as
    [stop - start, columns]; leading axes count as rows, a vector is one row. `sharding`: None for
    the default device, one `jax.sharding.Sharding` for all arrays, or a tree of them like Params.
    """
    of_leaf: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        of_leaf.setdefault(tensor.path, []).append(tensor)
    shapes = abstract(config, dtype)
    places = itertools.repeat(None)
    if sharding is not None:
        places = jax.tree.leaves(jax.tree.broadcast(sharding, shapes))
    arrays = []
    for (path, shape), place in zip(leaves(config), places, strict=sharding is not None):
        host = _aligned(shape, np.dtype(dtype))
        for tensor in of_leaf[path]:
            _fill(tensor, tensor.view(host), read_rows)
        arrays.append(jax.block_until_ready(jax.device_put(host, place)))
        del host
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _fill(tensor: Tensor, view: np.ndarray, read_rows: ReadRows) -> None:
    view = np.atleast_2d(view)
    step = tensor.interleaved or _ROWS
    first = 0
    for lead in np.ndindex(view.shape[:-2]):
        matrix = view[lead]
        for start in range(0, len(matrix), step):
            stop = min(start + step, len(matrix))
            matrix[start:stop] = read_rows(tensor, first + start, first + stop)
        first += len(matrix)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at a multiple of 64 bytes, which XLA's CPU client takes without copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
