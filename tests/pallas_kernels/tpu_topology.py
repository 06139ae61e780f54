"""Compiling for a TPU on a machine that has none: libtpu holds the whole compiler.

`compiled.cost_analysis()` gives "flops" and "bytes accessed" (a kernel counts as its own estimate
says) and "optimal_seconds"; `compiled.memory_analysis()` the sizes of arguments, output and scratch
in HBM. A kernel that asks for more vector memory than there is does not compile.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.tpu as pltpu
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

CHIPS = {  # topology, and cores that work as one device
    "v5e": ("v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1),
    "v5p": ("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 2),
    "v6e": ("v6e:2x2", pltpu.ChipVersion.TPU_V6E, 1),
}

_missing = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed; pip install 'jax[tpu]' compiles for a TPU anywhere",
)


def needs_libtpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test of `make chips`."""
    return pytest.mark.chips(_missing(test))


def info(chip: str) -> pltpu.TpuInfo:
    """What is known of one core of `chip`."""
    return pltpu.get_tpu_info_for_chip(*CHIPS[chip][1:])


def compile_for(chip: str, function: Callable[..., Any], *arrays: Any) -> Any:
    """`function` compiled for one `chip`; `arrays` are trees of arrays or of their shapes."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server of a cloud
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock file: nothing runs on a chip
    described = topologies.get_topology_desc(topology_name=CHIPS[chip][0], platform="tpu")
    mesh = Mesh(np.array(described.devices[:1]), ("one",))
    placed = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arrays)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*shapes).compile()


def kernels(compiled: Any) -> int:
    """How many Pallas kernels the program calls."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')
