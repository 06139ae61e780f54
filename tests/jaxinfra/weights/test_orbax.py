"""Orbax checkpoints of bare weights: both ways, sharded, and damaged in every file."""

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import CONFIGS, random_params

from jaxinfra.errors import UserError
from jaxinfra.weights import orbax as own


def _equal(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f == "qwen3_moe" else pytest.mark.slow) for f in CONFIGS],
)
def test_save_then_load_gives_the_same_bits(tmp_path, family):
    config = CONFIGS[family]
    params = random_params(config, jnp.bfloat16)
    own.save(tmp_path / "model", params, config)
    assert own.read_config(tmp_path / "model") == config
    loaded = own.load(tmp_path / "model", jnp.bfloat16)
    assert _equal(loaded, params)
    assert [leaf.dtype for leaf in jax.tree.leaves(loaded)] == [jnp.bfloat16] * len(
        jax.tree.leaves(params)
    )


@pytest.mark.parametrize(("rows", "chunk"), [(64 * 1031, 8 * 1031), (2053, 2053)])
def test_large_arrays_lie_in_chunks_unless_they_would_be_single_rows(tmp_path, rows, chunk):
    config = dataclasses.replace(CONFIGS["qwen3"], vocab_size=rows)
    own.save(tmp_path / "model", random_params(config, jnp.bfloat16), config)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        held = checkpointer.metadata(tmp_path / "model" / "params").item_metadata
    assert held.tree["embed"].storage.chunk_shape == (chunk, config.d_model)


def test_arrays_land_where_the_sharding_says_in_the_dtype_asked_for(tmp_path):
    config = CONFIGS["qwen3"]
    params = random_params(config, jnp.bfloat16)
    own.save(tmp_path / "model", params, config)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    tree = dataclasses.replace(jax.tree.map(lambda _: replicated, params), embed=by_rows)
    loaded = own.load(tmp_path / "model", jnp.float32, tree)
    assert loaded.embed.sharding == by_rows
    assert loaded.final_norm.sharding == replicated
    assert _equal(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))


def test_sharded_params_are_saved_whole(tmp_path):
    config = CONFIGS["qwen3"]
    params = random_params(config)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    sharded = dataclasses.replace(params, embed=jax.device_put(params.embed, by_rows))
    own.save(tmp_path / "model", sharded, config)
    assert _equal(own.load(tmp_path / "model", jnp.float32), params)


_DAMAGE = """
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    from jaxinfra.errors import UserError
    from jaxinfra.weights import orbax

    folder = Path(sys.argv[1])
    right = jax.tree.map(np.asarray, orbax.load(folder, jnp.float32))
    outcomes = []
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        good = file.read_bytes()
        for bad in (good[: len(good) // 2], None):
            file.unlink() if bad is None else file.write_bytes(bad)
            try:
                loaded = orbax.load(folder, jnp.float32)
                jax.tree.map(np.testing.assert_array_equal, loaded, right)
                outcomes.append("right")
            except UserError as error:
                assert str(folder) in str(error)
                outcomes.append("refused")
            file.write_bytes(good)
    print(outcomes.count("right"), outcomes.count("refused"))
"""


@pytest.mark.slow
def test_damage_in_any_file_gives_the_right_weights_or_a_usererror(tmp_path):
    """In a process of its own: reads that orbax leaves behind would end in another test."""
    config = CONFIGS["llama"]
    own.save(tmp_path / "model", random_params(config), config)
    command = [sys.executable, "-c", textwrap.dedent(_DAMAGE), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    right, refused = map(int, done.stdout.split())
    assert right > 5  # files that only repeat what others say
    assert refused > 10


def test_arrays_of_another_config_are_refused(tmp_path):
    params = random_params(CONFIGS["llama"])
    own.save(tmp_path / "model", params, CONFIGS["llama"].replace(d_ff=57))
    with pytest.raises(UserError, match="not those of its config"):
        own.load(tmp_path / "model", jnp.float32)


def test_foreign_checkpoints_and_folders_are_refused(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", {"w": jnp.ones(3)})
    with pytest.raises(UserError, match="foreign: this Orbax checkpoint has no item"):
        own.load(tmp_path / "foreign", jnp.float32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: not a finished Orbax checkpoint"):
        own.load(tmp_path / "empty", jnp.float32)


def test_an_existing_folder_is_not_overwritten(tmp_path):
    config = CONFIGS["llama"]
    own.save(tmp_path / "model", random_params(config), config)
    with pytest.raises(UserError, match="exists already"):
        own.save(tmp_path / "model", random_params(config, seed=1), config)
    assert _equal(own.load(tmp_path / "model", jnp.float32), random_params(config))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    config = CONFIGS["llama"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    with pytest.raises(UserError, match=r"/model: the disk is full: [\d,]+ bytes are needed"):
        own.save(tmp_path / "model", random_params(config), config)
    monkeypatch.undo()

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(UserError, match=r"the disk is full: .* \(No space left on device\)"):
        own.save(tmp_path / "model", random_params(config), config)
    assert not list(tmp_path.iterdir())


_MEASURE = """
    import sys
    import jax, jax.numpy as jnp
    import orbax.checkpoint as ocp
    from jaxinfra.weights import orbax as own

    def status(key):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    folder, how = sys.argv[1:]
    jnp.zeros(8).block_until_ready()
    before = status("VmRSS")
    if how == "by arrays":
        params = own.load(folder, jnp.bfloat16)
    else:
        item = ocp.args.Composite(params=ocp.args.PyTreeRestore())
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            stored = checkpointer.restore(folder, item).params
        params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), stored)
    print((status("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_within_a_third_of_the_model(tmp_path):
    """Of a process of its own; the model's 300 MB are noise, which compression leaves as large."""
    config = CONFIGS["llama"].replace(
        vocab_size=32_000, d_model=1024, num_heads=16, num_kv_heads=16, head_dim=64,
        d_ff=4096, num_layers=5,
    )  # fmt: skip
    own.save(tmp_path / "model", random_params(config, jnp.bfloat16), config)

    def peak(how: str) -> float:
        command = [sys.executable, "-c", textwrap.dedent(_MEASURE), str(tmp_path / "model"), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    assert 0.9 < peak("by arrays") < 1.3
    assert peak("all at once") > 1.5
