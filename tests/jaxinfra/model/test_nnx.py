"""The flax.nnx face holds the same parameters and gives the same logits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxinfra.model import transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.nnx import Transformer
from tests.jaxinfra.model_families import CONFIGS

from . import cases


@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip_shares_every_array(family):
    config = ModelConfig.from_hf(CONFIGS[family])
    params = cases.params(config)
    back = Transformer(config, params).params()
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert one is other


def test_same_logits_and_gradients():
    config = ModelConfig.from_hf(CONFIGS["qwen3"])
    params, tokens = cases.params(config), jnp.asarray(cases.tokens(config))
    model = Transformer(config, params)
    want = cases.forward(params, config, tokens)
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(model, tokens), want, rtol=1e-6)

    def loss(model):
        return jnp.mean(model(tokens) ** 2)

    got = nnx.jit(nnx.grad(loss))(model)
    tree = jax.jit(jax.grad(lambda p: jnp.mean(transformer.forward(p, config, tokens) ** 2)))
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree(params))[0]:
        name = ".".join(key.name for key in path)
        np.testing.assert_allclose(got["weights"][name][...], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_nnx_optimizer_trains_it():
    config = ModelConfig.from_hf(CONFIGS["llama"])
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(cases.tokens(config))
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = jax.nn.log_softmax(model(tokens[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0], losses
