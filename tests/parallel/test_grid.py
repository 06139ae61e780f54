"""Every triple of axes against one device, experts and pipelines together included.

A triple of twos uses all eight devices and holds its three pairs; those that other files train
are not trained again here.
"""

import itertools

import pytest

from parallel.mesh import Axis
from tests.parallel import (
    test_context,
    test_data,
    test_experts,
    test_pipeline_model,
    test_tensor,
    tiny,
)
from tests.parallel.emulated import cases
from tests.parallel.runs import differences, trained

ELSEWHERE = [
    *(case[1] for module in (test_context, test_data, test_tensor, test_pipeline_model)
      for case in module.CASES.values()),
    *(case[0] for case in test_experts.CASES.values()),
]  # fmt: skip
TRIPLES = {",".join(f"{axis}=2" for axis in axes): axes for axes in itertools.combinations(Axis, 3)}


def axes_of(mesh):
    return {part.partition("=")[0] for part in mesh.split(",")}


def here():
    trained = [axes_of(mesh) for mesh in ELSEWHERE]
    return [mesh for mesh in TRIPLES if axes_of(mesh) not in trained]


def test_the_triples_are_all_there():
    assert len(TRIPLES) == 20 and 0 < len(here()) < 20


@pytest.mark.parametrize("mesh", cases(here(), ()))
def test_equals_one_device(mesh):
    axes = TRIPLES[mesh]
    name = "llama" if Axis.EP not in axes else "moe" if Axis.PP not in axes else "unbalanced"
    options = {"accumulate": 2, "schedule": "1f1b", "context": "gather"} if Axis.PP in axes else {}
    builder = "zero3" if Axis.FSDP in axes else "zero2" if Axis.DP in axes else "dp"
    found = differences(trained(name, mesh, builder, **options), tiny.one_device(name))
    assert max(found.values()) < 1e-5, found
