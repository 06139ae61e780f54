"""Quantised folders in transformers with compressed-tensors, and SmolLM2 by all three methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.quantize import Scheme, compare, quantize, windows
from jaxinfra.errors import UserError
from jaxinfra.loading import Model, load
from jaxinfra.model import transformer
from jaxinfra.weights import compressed
from tests.decode.quantize_cases import CONFIG, trained


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(8), Scheme(8, float8=True)], ids=["int4", "int8", "float8"]
)
def test_transformers_computes_what_we_do(tmp_path, scheme):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model, _, held_out = trained()
    params = quantize(model.params, CONFIG, scheme)
    compressed.save(tmp_path / "q", params, CONFIG, model.tokenizer)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        found = theirs.eval()(torch.tensor(held_out[:2])).logits.numpy()
    expected = np.asarray(transformer.forward(params, CONFIG, jnp.asarray(held_out[:2])))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    floats = np.asarray(transformer.forward(model.params, CONFIG, jnp.asarray(held_out[:2])))
    assert np.abs(found - floats).max() > 1e-3 * np.abs(expected).max()  # it is the quantised one


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_at_four_bits():
    """KL of its first layers, on text of the library that no method saw: AWQ, GPTQ < rounding."""
    try:
        model = load("smollm2-135m", dtype=jnp.float32)
    except UserError as error:
        pytest.skip(str(error))
    config = model.config.replace(num_layers=3)
    layers = jax.tree.map(lambda a: a[:3], model.params.layers)
    model = Model(config, dataclasses.replace(model.params, layers=layers), model.tokenizer)
    text, held_out = windows("stdlib", model.tokenizer, count=4, length=256, held_out=4)
    kl = {}
    for method in ("rtn", "gptq", "awq"):
        params = quantize(model.params, model.config, Scheme(4, 64), method, text)
        kl[method] = compare(model.params, params, model.config, held_out).kl
    assert kl["gptq"] < 0.8 * kl["rtn"]
    assert kl["awq"] < 0.8 * kl["rtn"]
