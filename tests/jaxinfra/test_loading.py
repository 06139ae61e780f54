"""The one door: what does not belong together is told with the place it lies in."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfra import UserError, load
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import abstract
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.weights import safetensors
from tests.jaxinfra.model_families import CONFIGS


def test_the_tokenizer_of_another_model_is_refused_and_its_folder_named(tmp_path):
    config = ModelConfig.from_hf(CONFIGS["smollm2"])
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract(config))
    safetensors.save(tmp_path / "model", params, config)
    Tokenizer.byte_level().save(tmp_path / "model")
    with pytest.raises(UserError, match="/model: tokenizer: ids up to 319 do not fit the model's"):
        load(tmp_path / "model")
