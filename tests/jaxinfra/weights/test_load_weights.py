"""One door for every kind of checkpoint, and one sentence for what is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIGS, as_llama_cpp_stores, random_params, write_gguf

from jaxinfra.errors import UserError
from jaxinfra.weights import orbax, safetensors
from jaxinfra.weights.open import load_weights, read_config

_CONFIG = CONFIGS["llama"]


def _make(kind, path):
    params = random_params(_CONFIG)
    if kind == "safetensors":
        safetensors.save(path, params, _CONFIG)
    elif kind == "orbax":
        orbax.save(path, params, _CONFIG)
    else:
        path.mkdir()
        write_gguf(path / "m.gguf", _CONFIG, as_llama_cpp_stores(params, _CONFIG))
    return path / "m.gguf" if kind == "gguf file" else path


@pytest.mark.parametrize("kind", ["safetensors", "orbax", "gguf file", "gguf folder"])
def test_every_kind_gives_the_same_model(tmp_path, kind):
    path = _make(kind, tmp_path / "model")
    assert read_config(path) == _CONFIG
    config, params = load_weights(path, jnp.float32)
    assert config == _CONFIG
    for ours, theirs in zip(
        jax.tree.leaves(params), jax.tree.leaves(random_params(_CONFIG)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["safetensors", "orbax", "gguf file"])
def test_loaded_arrays_can_be_donated(tmp_path, kind):
    _, params = load_weights(_make(kind, tmp_path / "model"), jnp.float32)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    jax.tree.map(np.testing.assert_array_equal, step(params), expected)


def _nothing(path):
    pass


def _empty(path):
    path.mkdir()


def _text(path):
    path.write_text("hello")


def _two_files(path):
    path.mkdir()
    (path / "a.gguf").touch()
    (path / "b.gguf").touch()


def _config_only(path):
    _make("safetensors", path)
    (path / "model.safetensors").unlink()


def _folder_for_weights(path):
    _config_only(path)
    (path / "model.safetensors").mkdir()


def _bad_json(path):
    _make("safetensors", path)
    (path / "config.json").write_text("{")


def _edit(path, old, new):
    _make("safetensors", path)
    text = (path / "config.json").read_text()
    assert old in text
    (path / "config.json").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "model: no such file or folder; `jaxinfra pull NAME`"),
        (_empty, "model: no model here"),
        (lambda p: (p / "model").mkdir(parents=True), "a run's model is in .*model/model"),
        (lambda p: (p / "checkpoints").mkdir(parents=True), "jaxinfra train --resume"),
        (_text, "model: not a .gguf file"),
        (_two_files, "holds 2 .gguf files; give one"),
        (_config_only, "holds neither model.safetensors nor"),
        (_bad_json, "config.json: not valid JSON"),
        (_folder_for_weights, "holds neither model.safetensors nor"),
        (lambda p: _edit(p, "{", '{"quantization_config": "int8",'), "quantised by 'int8'"),
        (lambda p: _edit(p, '"llama"', '"mamba"'), "model_type 'mamba' is not supported"),
        (
            lambda p: _edit(p, '"num_key_value_heads": 2', '"num_key_value_heads": 4'),
            "num_heads=6 is not a multiple of num_kv_heads=4",
        ),
        (
            lambda p: _edit(p, '"num_key_value_heads": 2', '"num_key_value_heads": 3'),
            r"k_proj.weight has shape \[16, 36\], the config says \[24, 36\]",
        ),
        (
            lambda p: _edit(p, '"num_hidden_layers": 2', '"num_hidden_layers": 1'),
            "layers.1.* has no place",
        ),
        (
            lambda p: _edit(p, '"num_hidden_layers": 2', '"num_hidden_layers": 3'),
            r"layers\.2\..* is missing",
        ),
    ],
)
def test_what_is_no_model_is_one_sentence(tmp_path, make, message):
    make(tmp_path / "model")
    with pytest.raises(UserError, match=message) as error:
        load_weights(tmp_path / "model", jnp.float32)
    assert str(tmp_path / "model") in str(error.value)
    assert "\n" not in str(error.value)
