"""Axes, rules, what does not fit, and the cast that keeps gradients of device-varying branches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import UserError
from parallel import mesh as M
from parallel.mesh import Axis, Rules


def test_sizes_are_read_and_written():
    sizes = M.parse("tp=2, dp=4")
    assert sizes == {Axis.TP: 2, Axis.DP: 4}
    assert M.describe(sizes) == "dp=4,tp=2"
    assert M.make(sizes).shape == {"dp": 4, "tp": 2}
    assert M.make({}).shape == {"dp": 1}
    assert M.make(M.parse("pp=2,cp=1,tp=2")).axis_names == ("pp", "tp")


@pytest.mark.parametrize(
    ("text", "told"),
    [("xp=2", "no axis 'xp'"), ("dp=2,dp=2", "given twice"), ("dp=0", "1 or more"),
     ("dp", "1 or more"), ("dp=two", "1 or more")],
)  # fmt: skip
def test_bad_meshes_are_told(text, told):
    with pytest.raises(UserError, match=told):
        M.parse(text)


def test_too_few_devices_are_told():
    with pytest.raises(UserError, match="needs 16 devices and 8 are here"):
        M.make(M.parse("dp=16"))


RULES = Rules({"D": (Axis.FSDP,), "N": (Axis.TP,), "F": (Axis.TP,), "B": (Axis.DP, Axis.FSDP)})


def test_rules_give_specs_of_the_axes_that_are_there():
    mesh = M.make(M.parse("fsdp=2,tp=2"))
    assert RULES.spec("L D N H", mesh) == P(None, "fsdp", "tp", None)
    assert RULES.spec("B T", mesh) == P("fsdp", None)
    assert RULES.spec("B T", M.make(M.parse("dp=2,fsdp=2"))) == P(("dp", "fsdp"), None)
    assert RULES.spec("D N", M.make(M.parse("dp=2"))) == P(None, None)


def test_an_axis_used_twice_is_told():
    with pytest.raises(UserError, match="tp would cut both N and F"):
        RULES.spec("N F", M.make(M.parse("tp=2")))


def test_what_does_not_divide_is_told():
    mesh = M.make(M.parse("fsdp=2,tp=4"))
    RULES.check("D N H", (6, 8, 3), mesh, "q")
    with pytest.raises(UserError, match=r"N=6 of q \[D N H\] is no multiple of tp=4"):
        RULES.check("D N H", (6, 6, 3), mesh, "q")


def test_outer_axes_cross_slices():
    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        platform: str = "tpu"
        process_index: int = 0

    devices = [Device(i, i % 2) for i in range(8)]
    mesh = M.make(M.parse("dp=2,tp=4"), devices)
    assert M.slow_axes(mesh) == {Axis.DP}
    assert {d.slice_index for d in mesh.devices[0]} == {0}
    assert M.slow_axes(M.make(M.parse("tp=8"), devices)) == {Axis.TP}
    assert M.slow_axes(M.make(M.parse("dp=2,tp=4"))) == set()


def branch(cast: bool):
    """d/dx of the sum of (2 x on device 0, 3 x on device 1): 5."""
    mesh = M.make({Axis.PP: 2})

    def local(x):
        x = M.ensure_varying(x, (Axis.PP,)) if cast else x
        return jax.lax.cond(M.index("pp") == 0, lambda x: 2 * x, lambda x: 3 * x, x)[None]

    def f(x):
        return jnp.sum(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("pp"))(x))

    return float(jax.jit(jax.grad(f))(2.0))


def test_gradient_of_a_branch_on_a_varying_value():
    assert branch(cast=True) == 5.0


@pytest.mark.xfail(strict=True, reason="jax issue 40823: a wrong gradient and no error")
def test_gradient_of_a_branch_on_an_invariant_value():
    assert branch(cast=False) == 5.0


def test_ensure_varying_casts_what_is_missing_only():
    mesh = M.make(M.parse("dp=2,tp=2"))

    def local(x):
        once = M.ensure_varying(x, Axis)
        assert M.varying(x) == {"dp"} and M.varying(once) == {"dp", "tp"}
        assert M.ensure_varying(once, Axis) is once
        assert M.size("tp") == 2 and M.size("pp") == 1 and M.index("pp") == 0
        return once[None]

    jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("dp"), out_specs=P(("dp", "tp")))).lower(
        np.zeros(4, np.float32)
    )
