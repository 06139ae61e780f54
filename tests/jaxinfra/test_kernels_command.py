"""`jaxinfra kernels`: every kernel is told of, and what cannot be measured here says why."""

import importlib

import pytest

from jaxinfra.commands import kernels
from jaxinfra.errors import UserError
from jaxinfra.kernels import BENCHES, explain


@pytest.mark.parametrize("name", explain.NAMES)
def test_every_kernel_is_told_of(capsys, name):
    kernels("explain", name)
    assert len(capsys.readouterr().out) > 100


def test_every_bench_is_one_and_needs_a_gpu():
    for name, module in BENCHES.items():
        assert callable(importlib.import_module(f"jaxinfra.kernels.{module}").bench)
        with pytest.raises(UserError, match="GPU"):
            kernels("bench", name)


def test_an_unknown_kernel_is_named():
    for action in ("bench", "explain"):
        with pytest.raises(UserError, match=r"no kernel 'nothing'; there are .*matmul"):
            kernels(action, "nothing")
    with pytest.raises(UserError, match="tune matmul"):
        kernels("tune", "losses")
