"""The shapes that signatures tell of hold: annotated functions are checked while traced."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from jaxinfra.generate import sampling
from jaxinfra.generate.sampling import Sampling
from jaxinfra.model import cache, moe, rope, transformer
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import abstract
from jaxinfra.train import loss
from tests.jaxinfra.model_families import CONFIGS

B, T = 3, 7


@pytest.fixture(autouse=True)
def enforced(monkeypatch):
    for module in (transformer, cache, moe, rope, loss, sampling):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__
            shaped = "[Array, " in str(function.__annotations__)
            if own and shaped and name != "embed":  # which takes whatever has a table `embed`
                monkeypatch.setattr(module, name, jaxtyped(function, typechecker=beartype))


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("family", CONFIGS)
def test_training_and_decoding(family):
    config = ModelConfig.from_hf(CONFIGS[family])
    params = abstract(config, jnp.bfloat16)

    def train(params, tokens, segments):
        batch = {"tokens": tokens, "segment_ids": segments}
        return loss.next_token_loss(params, config, batch)[0]

    assert jax.eval_shape(train, params, ints(B, T), ints(B, T)).shape == ()

    def decode(params, tokens, lengths):
        params = cache.unstack(params, config)
        held = cache.empty(config, B, 16, jnp.bfloat16)
        x, held = cache.extend(params, config, tokens, held, lengths=lengths, fresh=True)
        _, held = cache.extend(params, config, tokens[:, :1], held)
        keys = sampling.row_keys(Sampling(seed=1), range(B))
        how = Sampling(temperature=0.7, top_k=5, top_p=0.9)
        logits = cache.head(params, config, x[:, -1:])[:, 0]
        return sampling.sample(logits, how, keys, held.length)

    assert jax.eval_shape(decode, params, ints(B, T), ints(B)).shape == (B,)


def test_another_shape_is_refused():
    config = ModelConfig.from_hf(CONFIGS["llama"])
    with pytest.raises(TypeCheckError):
        jax.eval_shape(lambda p, t: transformer.forward(p, config, t), abstract(config), ints(T))
