"""Meshes with named axes, and rules that say along which of them an array's dimensions are cut.

An array's dimensions are letters (D model width, N heads, ...); `Rules` maps a letter to mesh axes,
so a layout is one table and not a decision at every array. Axes of size one are left out of the
mesh: a collective over one device is then no instruction at all.

Outer axes cross the slow link: devices are laid out slice by slice, in the order of `Axis`, so that
pipeline stages and data replicas are apart and tensor shards are neighbours.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfra.errors import UserError


class Axis(enum.StrEnum):
    """Mesh axes, outermost first."""

    PP = "pp"  # pipeline stages: layers
    DP = "dp"  # data replicas: rows
    FSDP = "fsdp"  # rows, and the parameters' width
    EP = "ep"  # rows, and experts
    CP = "cp"  # positions of a row
    TP = "tp"  # heads, feed-forward width, vocabulary


ROWS = (Axis.DP, Axis.FSDP, Axis.EP)  # axes that share out the rows of a batch
DATA = (*ROWS, Axis.CP)  # axes over which a loss is summed


def emulate(devices: int) -> None:
    """Makes this process's CPU so many devices, and those all that jax sees.

    Best before anything else of jax; arrays that are there already are lost.
    """
    from jax.extend.backend import clear_backends

    if not 1 <= devices <= 512:
        raise UserError(f"emulate={devices}: give 1 to 512 devices")
    clear_backends()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def parse(text: str) -> dict[Axis, int]:
    """Sizes from "dp=2,tp=4"; axes that are not named have size one."""
    sizes: dict[Axis, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = part.partition("=")
        if name not in set(Axis):
            raise UserError(f"mesh: no axis {name!r}; there are {', '.join(Axis)}")
        if Axis(name) in sizes:
            raise UserError(f"mesh: axis {name!r} is given twice")
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"mesh: {part!r}: give a size of 1 or more, as in {name}=2")
        sizes[Axis(name)] = int(size)
    return sizes


def make(sizes: Mapping[Axis, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all axes larger than one; of `dp` alone where none is.

    Devices of several slices (TPU) or hosts without a common fast link are laid out slice by slice;
    those of one slice as jax finds best for its links.
    """
    devices = jax.devices() if devices is None else list(devices)
    axes = [axis for axis in Axis if sizes.get(axis, 1) > 1] or [Axis.DP]
    shape = tuple(sizes.get(axis, 1) for axis in axes)
    if (wanted := math.prod(shape)) > len(devices):
        raise UserError(
            f"mesh: {describe(sizes)} needs {wanted} devices and {len(devices)} are here; give "
            "smaller sizes, or emulate devices with jax_num_cpu_devices"
        )
    types = (AxisType.Auto,) * len(axes)
    slices = {_slice(device) for device in devices[:wanted]}
    if len(slices) == 1:
        placed = mesh_utils.create_device_mesh(
            shape, devices[:wanted], allow_split_physical_axes=True
        )
        return Mesh(placed, tuple(axes), axis_types=types)
    ordered = sorted(devices[:wanted], key=lambda d: (_slice(d), d.id))
    return Mesh(np.array(ordered).reshape(shape), tuple(axes), axis_types=types)


def slow_axes(mesh: Mesh) -> set[Axis]:
    """The axes along which some neighbours lie in different slices."""
    slices = np.vectorize(_slice)(mesh.devices)
    return {
        Axis(name)
        for dim, name in enumerate(mesh.axis_names)
        if (np.diff(slices, axis=dim) != 0).any()
    }


def _slice(device: Any) -> int:
    found = getattr(device, "slice_index", None)
    return 0 if found is None else found


def describe(sizes: Mapping[Any, int]) -> str:
    """ "dp=2,tp=4" of a mesh's shape."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in Axis if sizes.get(axis, 1) > 1) or "dp=1"


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes cut a dimension, by its letter; a letter that is not named is not cut."""

    axes: Mapping[str, tuple[Axis, ...]]

    def spec(self, letters: str, mesh: Any) -> PartitionSpec:
        """The PartitionSpec of an array with dimensions `letters`, as "L D N H".

        Raises UserError where two dimensions would be cut along one mesh axis.
        """
        used: dict[Axis, str] = {}
        entries: list[Any] = []
        for letter in letters.split():
            here = tuple(axis for axis in self.axes.get(letter, ()) if axis in mesh.shape)
            for axis in here:
                if axis in used:
                    raise UserError(
                        f"rules: mesh axis {axis!s} would cut both {used[axis]} and {letter} of "
                        f"[{letters}]; an axis cuts one dimension of an array"
                    )
                used[axis] = letter
            entries.append(here[0].value if len(here) == 1 else tuple(map(str, here)) or None)
        return PartitionSpec(*entries)

    def check(self, letters: str, shape: Sequence[int], mesh: Any, name: str) -> None:
        """Raises UserError where a dimension is no multiple of the parts it is cut into."""
        for letter, size, entry in zip(
            letters.split(), shape, self.spec(letters, mesh), strict=True
        ):
            parts = math.prod(mesh.shape[axis] for axis in axes_of((entry,)))
            if size % parts:
                raise UserError(
                    f"mesh: {letter}={size} of {name} [{letters}] is no multiple of "
                    f"{'*'.join(axes_of((entry,)))}={parts}; give another size of that axis"
                )


def axes_of(spec: Iterable[Any]) -> tuple[str, ...]:
    """The mesh axes that a PartitionSpec names."""
    named = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(axis for entry in named for axis in entry)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """A tree of NamedShardings from a tree of PartitionSpecs."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def size(axis: str) -> int:
    """Inside `shard_map`: devices along an axis; 1 for an axis that the mesh does not have."""
    return jax.sharding.get_abstract_mesh().shape[axis] if present((axis,)) else 1


def present(axes: Iterable[str]) -> tuple[str, ...]:
    """Inside `shard_map`: those of `axes` that the mesh has; none where the compiler sees to it."""
    here = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(str(axis) for axis in axes if axis in here)


def index(axis: str) -> Any:
    """Inside `shard_map`: this device's place along an axis; 0 for one that the mesh has not."""
    return jax.lax.axis_index(axis) if size(axis) > 1 else 0


def varying(x: Any) -> frozenset[str]:
    """Inside `shard_map`: the axes along which a value may differ from device to device."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def ensure_varying(tree: Any, axes: Iterable[str]) -> Any:
    """Inside `shard_map`: every leaf typed as varying over `axes` (those that the mesh has).

    Whatever a device-varying `lax.cond` closes over or takes must pass through this first: its
    gradient is wrong otherwise, without an error (jax issue 40823).
    """
    wanted = frozenset(present(axes))

    def cast(leaf: Any) -> Any:
        missing = wanted - varying(leaf)
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
