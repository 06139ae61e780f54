"""Names of checkpoints: those of transformers and llama.cpp, each array covered exactly once."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import ARCHITECTURES, CONFIGS, gguf_names

from jaxinfra.model.params import abstract
from jaxinfra.weights.names import gguf_tensors, hf_tensors, leaves

_RECORDED = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "hf_weights_names.json").read_text()
)["tensors"]


def _covered(config, tensors) -> list[np.ndarray]:
    """How often the tensors write to each element of each array of Params."""
    counts = {path: np.zeros(shape, np.int8) for path, shape in leaves(config)}
    for tensor in tensors:
        tensor.view(counts[tensor.path])[...] += 1
    return list(counts.values())


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_shapes_are_those_that_transformers_saves(family):
    ours = {tensor.name: list(tensor.shape) for tensor in hf_tensors(CONFIGS[family])}
    assert ours == _RECORDED[family]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_gguf_names_are_those_of_the_gguf_package(family):
    config = CONFIGS[family]
    assert {t.name for t in gguf_tensors(config)} == set(gguf_names(config).values())


@pytest.mark.parametrize("names", [hf_tensors, gguf_tensors])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_element_belongs_to_exactly_one_tensor(family, names):
    config = CONFIGS[family]
    assert all((count == 1).all() for count in _covered(config, names(config)))


@pytest.mark.parametrize("wrong", ["one layer twice", "a tensor left out"])
def test_the_coverage_check_can_fail(wrong):
    config = CONFIGS["qwen3"]
    tensors = list(hf_tensors(config))
    if wrong == "one layer twice":
        tensors.append(tensors[5])
    else:
        del tensors[5]
    assert not all((count == 1).all() for count in _covered(config, tensors))


def test_a_view_has_inputs_last_and_heads_slowest():
    config = CONFIGS["llama"]
    by_name = {tensor.name: tensor for tensor in hf_tensors(config)}
    draws = np.random.default_rng(0)
    leaf = {path: draws.standard_normal(shape) for path, shape in leaves(config)}
    q = by_name["model.layers.1.self_attn.q_proj.weight"].view(leaf["layers.attn.q"])
    o = by_name["model.layers.1.self_attn.o_proj.weight"].view(leaf["layers.attn.o"])
    N, H = config.num_heads, config.head_dim
    for head, width in np.ndindex(N, H):
        np.testing.assert_array_equal(q[head * H + width], leaf["layers.attn.q"][1, :, head, width])
        np.testing.assert_array_equal(o[:, head * H + width], leaf["layers.attn.o"][1, head, width])


@pytest.mark.parametrize("names", [hf_tensors, gguf_tensors])
def test_views_never_copy(names):
    for config in CONFIGS.values():
        leaf = {path: np.zeros(shape, np.int8) for path, shape in leaves(config)}
        for tensor in names(config):
            view = tensor.view(leaf[tensor.path])
            assert view.shape == tensor.shape
            assert np.shares_memory(view, leaf[tensor.path])


def test_paths_are_those_of_the_tree():
    for config in CONFIGS.values():
        for (path, shape), leaf in zip(
            leaves(config), jax.tree.leaves(abstract(config)), strict=True
        ):
            assert shape == leaf.shape, path
