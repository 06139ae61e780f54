"""Logits and gradients of every family equal those of the installed transformers."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from jaxinfra.model.config import ModelConfig
from jaxinfra.weights.names import hf_tensors
from tests.jaxinfra.model_families import CONFIGS

from . import cases, oracle

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@functools.cache
def both(family: str):
    config = ModelConfig.from_hf(CONFIGS[family])
    return config, cases.params(config), oracle.model(CONFIGS[family], config)


@pytest.mark.parametrize("family", CONFIGS)
def test_logits(family):
    config, params, hf = both(family)
    tokens = cases.tokens(config)
    want = oracle.logits(hf, tokens)
    assert cases.relative_error(cases.forward(params, config, tokens), want) < 1e-5


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("mixtral", {"sliding_window": 5}),
        ("llama", {"sliding_window": 5}),  # a key that this family does not look at
        ("mistral", {"sliding_window": None}),
    ],
)
def test_logits_where_windows_are_not_the_family_s_usual(family, change):
    raw = CONFIGS[family] | change
    config = ModelConfig.from_hf(raw)
    tokens = cases.tokens(config)
    want = oracle.logits(oracle.model(raw, config), tokens)
    assert cases.relative_error(cases.forward(cases.params(config), config, tokens), want) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_padded_rows(family, side):
    config, params, hf = both(family)
    tokens, mask = cases.padded(config, side)
    want, got = oracle.logits(hf, tokens, mask), cases.forward(params, config, tokens, mask)
    for row, length in enumerate(cases.LENGTHS):
        real = np.flatnonzero(mask[row])
        assert len(real) == length
        assert cases.relative_error(got[row, real], want[row, real]) < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_packed_rows(family):
    config, params, hf = both(family)
    tokens, segments = cases.packed(config)
    got = np.asarray(cases.forward(params, config, tokens, segments))
    for segment in (1, 2):
        place = segments[0] == segment
        want = oracle.logits(hf, tokens[:, place])
        assert cases.relative_error(got[:, place], want) < 1e-5


@pytest.mark.parametrize("remat", ["none", "matmuls"])
@pytest.mark.parametrize("family", cases.GRADIENT_FAMILIES)
def test_gradients(family, remat):
    config, params, hf = both(family)
    tokens = cases.tokens(config)
    want = oracle.gradients(hf, tokens)

    got = cases.gradients(params, config, tokens, remat)
    for tensor in hf_tensors(config):
        mine = tensor.view(got[tensor.path])
        error = np.linalg.norm(mine - want[tensor.name]) / np.linalg.norm(want[tensor.name])
        assert error < 1e-4, (tensor.name, error)
