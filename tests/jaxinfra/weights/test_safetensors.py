"""Hugging Face folders: what is written is read back, and every kind of damage is one UserError."""

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import CONFIGS, random_params, state_dict

from jaxinfra.errors import UserError
from jaxinfra.model.params import abstract
from jaxinfra.weights import safetensors as own


def _equal(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.fixture
def saved(tmp_path):
    """A small Llama saved in four shards: (folder, config, params)."""
    config = CONFIGS["llama"]
    params = random_params(config)
    own.save(tmp_path / "model", params, config, max_shard_bytes=25_000)
    return tmp_path / "model", config, params


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_save_then_load_gives_the_same_bits(tmp_path, family, dtype):
    config = CONFIGS[family]
    params = random_params(config, dtype)
    own.save(tmp_path / "model", params, config)
    assert _equal(own.load(tmp_path / "model", config, dtype), params)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_safetensors_package_reads_what_is_written_and_the_reverse(tmp_path, family):
    config = CONFIGS[family]
    params = random_params(config)
    own.save(tmp_path / "ours", params, config)
    theirs = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    expected = state_dict(params, config)
    assert theirs.keys() == expected.keys()
    assert all(np.array_equal(theirs[name], expected[name]) for name in expected)
    (tmp_path / "theirs").mkdir()
    safetensors.numpy.save_file(expected, tmp_path / "theirs" / "model.safetensors")
    assert _equal(own.load(tmp_path / "theirs", config, jnp.float32), params)


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(saved):
    folder, config, params = saved
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert {file.name for file in shards} == set(index["weight_map"].values())
    expected = state_dict(params, config)
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in expected.values())
    for shard in shards:
        assert sum(a.nbytes for a in safetensors.numpy.load_file(shard).values()) <= 25_000
    assert _equal(own.load(folder, config, jnp.float32), params)


def test_loading_in_another_dtype_rounds_once(saved):
    folder, config, params = saved
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert _equal(own.load(folder, config, jnp.bfloat16), rounded)


def test_arrays_land_where_the_sharding_says(saved):
    folder, config, params = saved
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    named = jax.sharding.NamedSharding
    replicated = named(mesh, jax.sharding.PartitionSpec())
    tree = jax.tree.map(lambda _: replicated, params)
    tree = tree.replace(embed=named(mesh, jax.sharding.PartitionSpec("model")))
    loaded = own.load(folder, config, jnp.float32, tree)
    assert _equal(loaded, params)
    assert loaded.embed.sharding == tree.embed
    assert loaded.layers.attn.q.sharding == replicated


def test_a_tied_checkpoint_may_hold_the_embedding_twice(tmp_path):
    config = CONFIGS["qwen3"]
    params = random_params(config)
    arrays = state_dict(params, config)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    assert _equal(own.load(tmp_path, config, jnp.float32), params)


def test_tokenizer_files_are_copied_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_text("not to be copied")
    config = CONFIGS["llama"]
    own.save(tmp_path / "new", random_params(config), config, tokenizer_from=source)
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert own.load(tmp_path / "new", config, jnp.float32)


def _drop(arrays):
    del arrays["model.layers.1.mlp.up_proj.weight"]


def _reshape(arrays):
    arrays["model.norm.weight"] = arrays["model.norm.weight"][:-1]


def _transpose(arrays):
    name = "model.layers.0.self_attn.q_proj.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)


def _add(arrays):
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)


def _integer(arrays):
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "up_proj.weight is missing"),
        (_reshape, r"norm.weight has shape \[35\], the config says \[36\]"),
        (_transpose, r"q_proj.weight has shape \[36, 48\], the config says \[48, 36\]"),
        (_add, "q_proj.bias has no place"),
        (_integer, "norm.weight is of type I8"),
    ],
)
def test_tensors_that_are_not_the_configs_are_refused(tmp_path, change, message):
    config = CONFIGS["llama"]
    arrays = state_dict(random_params(config), config)
    change(arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        own.load(tmp_path, config, jnp.float32)
    assert str(tmp_path) in str(error.value)


def test_a_missing_shard_is_named(saved):
    folder, config, _ = saved
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: no such file"):
        own.load(folder, config, jnp.float32)


@pytest.mark.parametrize("left", [0, 7, 8, 100, 2_000, -1])
def test_a_truncated_file_is_named(tmp_path, left):
    config = CONFIGS["llama"]
    own.save(tmp_path / "model", random_params(config), config)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=r"model\.safetensors: .*fetch it again"):
        own.load(tmp_path / "model", config, jnp.float32)


def test_a_damaged_header_never_gives_anything_but_a_usererror(tmp_path):
    config = CONFIGS["llama"]
    own.save(tmp_path / "model", random_params(config), config)
    file = tmp_path / "model" / "model.safetensors"
    good = file.read_bytes()
    draws = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        for place in draws.integers(0, 2_000, 3):
            bad[place] = draws.integers(256)
        file.write_bytes(bad)
        try:
            own.load(tmp_path / "model", config, jnp.float32)
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"weight_map": 3}', "{}", '{"weight_map": ["model.safetensors"]}', "[" * 200_000,
     '{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}'],
)  # fmt: skip
def test_a_damaged_index_is_named(saved, text):
    folder, config, _ = saved
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json: not a safetensors index"):
        own.load(folder, config, jnp.float32)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "ABSOLUTE", "", "..", "a\0b", 1, None,
                                   ["a"], "a" * 300 + ".safetensors"])  # fmt: skip
def test_a_shard_is_a_file_of_its_folder(saved, shard):
    folder, config, _ = saved
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    name, inside = next(iter(raw["weight_map"].items()))
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / inside).read_bytes())
    raw["weight_map"][name] = str(outside) if shard == "ABSOLUTE" else shard
    index.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="not a safetensors index"):
        own.load(folder, config, jnp.float32)


def test_a_tensor_comes_from_the_shard_that_the_index_names(saved):
    """A later shard with a stale copy of the embedding, as a second save into a folder leaves."""
    folder, config, params = saved
    last = max(folder.glob("*.safetensors"))
    arrays = safetensors.numpy.load_file(last)
    stale = {"model.embed_tokens.weight": np.zeros((40, 36), np.float32)}
    safetensors.numpy.save_file(arrays | stale, last)
    assert _equal(own.load(folder, config, jnp.float32), params)
    safetensors.numpy.save_file(stale, last)
    with pytest.raises(UserError, match=rf"{last.name}: lacks tensor {min(arrays)}"):
        own.load(folder, config, jnp.float32)


def _offsets(of, to):
    def change(entries):
        entries[of]["data_offsets"] = to(entries)
        return entries

    return change


_NORM, _NEXT = "model.norm.weight", "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_offsets(_NORM, lambda e: [float(n) for n in e[_NORM]["data_offsets"]]), "no integers"),
        (_offsets(_NORM, lambda e: [float("nan"), 1]), "no integers"),
        (_offsets(_NORM, lambda e: [-144, 0]), "no integers"),
        (_offsets(_NORM, lambda e: e[_NEXT]["data_offsets"]), "overlaps another"),
        (lambda e: e | {_NORM: e[_NORM] | {"shape": [-36, -1]}}, "no integers"),
        (lambda e: e | {_NORM: 5}, "not a safetensors file"),
        (lambda e: json.dumps(e)[:-1] + f', "{_NORM}": {json.dumps(e[_NEXT])}}}', "a key twice"),
        (lambda e: "[" * 200_000, "not a safetensors file"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, change, message):
    config = CONFIGS["llama"]
    own.save(tmp_path / "model", random_params(config), config)
    file = tmp_path / "model" / "model.safetensors"
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    changed = change(json.loads(good[8 : 8 + length]))
    raw = (changed if isinstance(changed, str) else json.dumps(changed)).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + good[8 + length :])
    with pytest.raises(UserError, match=message) as error:
        own.load(tmp_path / "model", config, jnp.float32)
    assert str(file) in str(error.value)


def test_an_existing_folder_is_not_overwritten(saved):
    folder, config, params = saved
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="exists already"):
        own.save(folder, params, config)
    assert sorted(folder.iterdir()) == before


def test_params_of_another_config_are_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"params: .* config says"):
        own.save(tmp_path / "model", random_params(CONFIGS["llama"]), CONFIGS["qwen2"])
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    config = CONFIGS["llama"]
    with pytest.raises(UserError, match=r"/model: the disk is full: [\d,]+ bytes are needed"):
        own.save(tmp_path / "model", random_params(config), config)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def full(file, shard, arrays):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write_bytes(b"half a checkpoint")
        written.append(file)

    monkeypatch.setattr(own, "write", full)
    config = CONFIGS["llama"]
    with pytest.raises(UserError, match="the disk is full"):
        own.save(tmp_path / "model", random_params(config), config, max_shard_bytes=25_000)
    assert written
    assert not list(tmp_path.iterdir())


_MEASURE = """
    import sys
    import jax, jax.numpy as jnp, numpy as np, safetensors.numpy
    from jaxinfra.model.config import ModelConfig
    from jaxinfra.weights import safetensors as own

    def status(key):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    folder, how = sys.argv[1:]
    config = ModelConfig.from_file(folder)
    jnp.zeros(8).block_until_ready()
    before = status("VmRSS")
    if how == "streamed":
        params = own.load(folder, config, jnp.bfloat16)
    else:
        arrays = safetensors.numpy.load_file(folder + "/model.safetensors")
        q = [arrays[n] for n in arrays if "q_proj" in n]
        params = jax.tree.map(jnp.asarray, (arrays, np.stack(q)))
    print((status("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float32])
def test_peak_memory_is_within_a_third_of_the_model(tmp_path, stored):
    """VmHWM is of this process alone; ru_maxrss starts at the parent's peak."""
    config = CONFIGS["llama"].replace(
        vocab_size=32_000, d_model=1024, num_heads=16, num_kv_heads=16, head_dim=64,
        d_ff=4096, num_layers=5,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, stored), abstract(config))
    own.save(tmp_path / "model", params, config)

    def peak(how: str) -> float:
        command = [sys.executable, "-c", textwrap.dedent(_MEASURE), str(tmp_path / "model"), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert 0.9 < peak("streamed") < 1.3
    assert peak("all at once") > 1.5
