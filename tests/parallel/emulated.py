"""Meshes of emulated devices, and programs over one axis of eight of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel import mesh as M

RING = 8
CUT = P("tp")


def over_ring(function: Callable, *, ins: Any = CUT, out: Any = CUT) -> Callable:
    """`function(local arrays)` over eight devices of the axis tp, compiled."""
    mesh = M.make({M.Axis.TP: RING})
    mapped = jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=out)
    return jax.jit(mapped)


def cases(every: Iterable[Any], default: Iterable[Any]) -> list[Any]:
    """Cases to parametrize over; those that are not in `default` are marked slow."""
    assert set(default) <= set(every), default
    return [
        case if case in default else pytest.param(case, marks=pytest.mark.slow)
        for case in sorted(every)
    ]


def relative(found: Any, wanted: Any) -> float:
    """The largest difference of two trees, leaf by leaf over the largest entry of the leaf wanted.

    Leaves that are all zero in the tree wanted must be so in the other as well.
    """
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    worst = 0.0
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, (a.shape, b.shape)
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst
