"""Counts of a compiled program against numbers worked out by hand; conditions without places."""

import datetime
import getpass
import json
import platform
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxinfra.measure import collectives, cost, environment, flops, memory, stages
from jaxinfra.measure import environment as conditions
from jaxinfra.measure.environment import without_folders


def test_cost_and_memory():
    n = 32
    found = stages(lambda x, y: x @ y + x, *[jnp.ones((n, n))] * 2, donate_argnums=0)
    assert min(found.trace, found.lower, found.compile) > 0
    assert cost(found.compiled).flops == flops(found.compiled)
    assert abs(flops(found.compiled) - (2 * n**3 + n * n)) < 0.02 * 2 * n**3
    assert cost(found.compiled).bytes >= 3 * 4 * n * n
    kept = memory(found.compiled)
    assert (kept.arguments, kept.outputs, kept.aliased) == (8 * n * n, 4 * n * n, 4 * n * n)
    assert kept.peak >= kept.arguments
    assert memory(stages(lambda x, y: x @ y + x, *[jnp.ones((n, n))] * 2).compiled).aliased == 0
    assert cost(stages(jnp.sin, jnp.ones(64)).compiled).transcendentals == 64
    assert cost(stages(lambda x: x, jnp.ones(64)).compiled).flops == 0


def test_collectives():
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def array(shape, *spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def mlp(x, w1, w2):
        out = jnp.tanh(x @ w1) @ w2
        return jax.lax.with_sharding_constraint(out, jax.sharding.NamedSharding(mesh, jax.P("d")))

    args = array((8, 16), "d", None), array((16, 32), None, "t"), array((32, 16), "t", None)
    assert collectives(jax.jit(mlp).lower(*args).compile()) == {"all-reduce": 1}
    assert collectives(jax.jit(jnp.tanh).lower(args[0]).compile()) == {}

    def scatter(x):
        return jax.lax.psum_scatter(x, "t", tiled=True)

    mapped = jax.shard_map(scatter, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P(("d", "t")))
    assert collectives(jax.jit(mapped).lower(args[0]).compile()) == {"reduce-scatter": 1}


def test_only_operations_are_collectives():
    class Text:
        def as_text(self):
            return """
            %all-reduce.1 = f32[8] all-reduce(%x), metadata={op_name="jit(f)/all-reduce(x)"}
            %s = (f32[8], f32[8]) all-gather-start(%all-reduce.1)
            %d = f32[8] all-gather-done(%s)
            %r = f32[8] ragged-all-to-all(%d), %t = f32[8] get-tuple-element(%all-to-all.3)
            """

    assert collectives(Text()) == {"all-reduce": 1, "all-gather": 1, "ragged-all-to-all": 1}


def test_conditions():
    found = environment()
    assert found["jax"] == jax.__version__ and found["python"] == platform.python_version()
    assert found["device"] == f"8 x {jax.devices()[0].device_kind}"
    assert datetime.date.fromisoformat(found["date"])
    assert json.loads(json.dumps(found)) == found


def test_conditions_name_no_place(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/ada/dump --xla_foo=1")
    monkeypatch.setattr(sys, "orig_argv", ["/opt/ada/bin/python", "-m", "bench", "~/ada/x.gguf"])
    found = environment()
    assert found["XLA_FLAGS"] == "--xla_dump_to=dump --xla_foo=1"
    assert found["command line"] == "python -m bench x.gguf"
    text = json.dumps(found)
    assert str(Path.home()) + "/" not in text and str(Path.cwd()) not in text
    assert platform.node() not in text and f"/{getpass.getuser()}/" not in text
    assert without_folders("a/b ../c 3/4 /x/y/z:/u/v") == "a/b ../c 3/4 z:v"


def test_torch_is_a_condition_only_where_it_is_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert "torch" not in environment()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_another_project_is_not_ours(monkeypatch, tmp_path):
    """Installed into an environment that lies in somebody's checkout, we are not that commit."""
    module = sys.modules[conditions.__module__]
    found = environment()
    assert (found["commit"] is None) == (found["uncommitted changes"] is None)
    if found["commit"]:
        monkeypatch.setattr(module, "__file__", str(Path(module.__file__).parent / "installed.py"))
        assert environment()["commit"] is None
    monkeypatch.setattr(module, "__file__", str(tmp_path / "environment.py"))
    assert environment()["commit"] is None and environment()["uncommitted changes"] is None
