"""Logits and gradients of every family equal those that transformers gave for the fixture.

Causality lets one set of logits judge every layout: a padded or packed row must give each document
the logits it has alone.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.model.config import ModelConfig
from jaxinfra.weights.names import hf_tensors
from tests.jaxinfra.model_families import CONFIGS

from . import cases

FIXTURE = np.load(Path(__file__).parents[2] / "fixtures" / "model_parity.npz")


def error(got, family: str, row: int) -> float:
    """Of the logits of the first tokens of `row`."""
    want = FIXTURE[f"{family}.logits"][row, : got.shape[0]]
    return cases.relative_error(np.asarray(got)[:, ::4], want)


@pytest.mark.parametrize("family", CONFIGS)
def test_logits(family):
    config = ModelConfig.from_hf(CONFIGS[family])
    params = cases.params(config)
    got = cases.forward(params, config, cases.tokens(config))
    assert max(error(got[row], family, row) for row in (0, 1)) < 1e-5
    for side in ("left", "right"):
        tokens, mask = cases.padded(config, side)
        got = cases.forward(params, config, tokens, mask)
        for row in (0, 1):
            assert error(got[row, np.flatnonzero(mask[row])], family, row) < 1e-5
    tokens, segments = cases.packed(config)
    got = cases.forward(params, config, tokens, segments)
    for row in (0, 1):
        assert error(got[0, np.flatnonzero(segments[0] == row + 1)], family, row) < 1e-5


@pytest.mark.parametrize("remat", ["none", "matmuls", "attention", "full"])
@pytest.mark.parametrize("family", cases.GRADIENT_FAMILIES)
def test_gradients(family, remat):
    config = ModelConfig.from_hf(CONFIGS[family])
    got = cases.gradients(cases.params(config), config, cases.tokens(config), remat)
    for tensor, (norm, product) in zip(
        hf_tensors(config), FIXTURE[f"{family}.gradients"], strict=True
    ):
        found = cases.summary(tensor.view(got[tensor.path]))
        assert abs(found[0] - norm) < 1e-4 * norm, tensor.name
        assert abs(found[1] - product) < 1e-4 * norm, tensor.name


def wrong(config: ModelConfig) -> dict[str, ModelConfig]:
    """Near misses that the check of the logits must reject."""
    rope = dataclasses.replace(config.rope, theta=config.rope.theta * 2)
    variants = {
        "rope": config.replace(rope=rope),
        "scale": config.replace(attn_scale=config.scale * 1.001),
        "norm_eps": config.replace(norm_eps=1e-4),
        "activation": config.replace(
            activation="silu" if config.activation == "gelu_tanh" else "gelu_tanh"
        ),
    }
    if config.windows:
        longer = tuple(w and w + 1 for w in config.windows)
        variants |= {"window": config.replace(windows=longer),
                     "no window": config.replace(windows=None)}  # fmt: skip
    if config.rope_local:
        variants["one rope"] = config.replace(rope_local=None)
    if config.rope.kind != "default":
        rope = dataclasses.replace(config.rope, kind="default")
        variants["rope scaling"] = config.replace(rope=rope)
    if config.logit_soft_cap:
        variants["soft cap"] = config.replace(logit_soft_cap=None)
    if config.experts:
        experts = dataclasses.replace(config.experts, renormalise=False)
        variants["renormalise"] = config.replace(experts=experts)
        experts = dataclasses.replace(config.experts, top_k=1)
        variants["top_k"] = config.replace(experts=experts)
    return variants


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_near_misses_are_rejected(family):
    config = ModelConfig.from_hf(CONFIGS[family])
    params, tokens = cases.params(config), cases.tokens(config)
    for name, variant in wrong(config).items():
        assert error(cases.forward(params, variant, tokens)[0], family, 0) > 1e-5, name


def test_segments_matter():
    config = ModelConfig.from_hf(CONFIGS["qwen3"])
    tokens, segments = cases.packed(config)
    got = cases.forward(cases.params(config), config, tokens)
    assert error(got[0, np.flatnonzero(segments[0] == 2)], "qwen3", 1) > 1e-3
