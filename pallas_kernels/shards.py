"""Kernels inside `shard_map`, where each device has its own parts and XLA partitions nothing.

With `check_vma`, arrays are typed by the mesh axes along which they differ from device to device.
Kernels know nothing of it: what they give is typed as equal everywhere, and gradients that differ
would be taken for equal ones. So what goes into a kernel is typed alike first, the gradient of
which sums over the devices that had the same array, and so is what comes out of it.
"""

from __future__ import annotations

from typing import Any

import jax


def partitioned() -> bool:
    """Whether XLA may have to split a kernel's call: several devices, outside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() > 1 and not manual


def refusal() -> str | None:
    """Why a kernel that is only called outside `shard_map` cannot run here, or None if it can."""
    return "XLA does not partition it" if jax.device_count() > 1 else None


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each typed as different along every axis along which one of them is."""
    axes = frozenset[Any]().union(*map(_axes, arrays))
    return tuple(_over(x, axes) for x in arrays)


def like(made: jax.Array, given: jax.Array) -> jax.Array:
    """What a kernel made of an array, typed as different where that is."""
    return _over(made, _axes(given))


def _axes(x: jax.Array) -> frozenset[Any]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _over(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    missing = tuple(sorted(axes - _axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
