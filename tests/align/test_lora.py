"""Adapters: they begin at nothing, merged they give the same logits, PEFT's files hold them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align import lora
from align.trainer_config import LoRA
from jaxinfra.errors import UserError
from jaxinfra.model import params as P
from jaxinfra.model import transformer
from jaxinfra.weights import safetensors
from jaxinfra.weights.open import load_weights
from tests.align.tiny import MODEL, difference, params

HOW = LoRA(rank=3, alpha=6.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 9)))


def trained(how=HOW, seed=0):
    """Adapters whose B is not zero."""
    adapters = lora.init(jax.random.key(seed), MODEL, how)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), adapters)


@jax.jit
def logits(params):
    return transformer.forward(params, MODEL, TOKENS)


def test_adapters_begin_at_the_frozen_model():
    adapters = lora.init(jax.random.key(0), MODEL, HOW)
    plain = logits(params())
    assert difference(logits(lora.attach(params(), adapters, HOW)), plain) < 5e-6
    assert lora.merge(params(), adapters, HOW).layers.attn.q.tobytes() == (
        params().layers.attn.q.tobytes()
    )
    bound = MODEL.d_model**-0.5
    assert 0.8 * bound < float(jnp.max(jnp.abs(adapters["q"].a))) <= bound


@pytest.mark.parametrize("targets", [HOW.targets, ("q", "down")])
def test_merged_is_unmerged(targets):
    how = dataclasses.replace(HOW, targets=targets)
    adapters = trained(how)
    apart = logits(lora.attach(params(), adapters, how))
    assert difference(apart, logits(lora.merge(params(), adapters, how))) < 2e-5
    assert difference(apart, logits(params())) > 0.1
    doubled = dataclasses.replace(how, alpha=2 * how.alpha)
    assert difference(apart, logits(lora.merge(params(), adapters, doubled))) > 0.01


def test_only_adapters_have_gradients():
    """No array of the frozen matrices' size is made in the backward pass."""
    how = LoRA(rank=1, targets=("q", "gate"))
    model = dataclasses.replace(MODEL, d_ff=100)
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), model, how))

    def loss(adapters, frozen):
        return jnp.sum(transformer.forward(lora.attach(frozen, adapters, how), model, TOKENS))

    def made(argument):
        """Equations whose result has a gate's shape."""
        text = str(jax.make_jaxpr(jax.grad(loss, argument))(adapters, P.abstract(model)))
        return [line for line in text.splitlines() if "f32[16,100] =" in line]

    assert made(1) and not made(0)


def test_saved_adapters_come_back_and_are_pefts(tmp_path):
    adapters = trained()
    lora.save(tmp_path / "adapter", adapters, HOW, MODEL, base="some/model")
    again, how = lora.load(tmp_path / "adapter", MODEL)
    assert how == dataclasses.replace(HOW, targets=tuple(sorted(HOW.targets, key=_module)))
    assert difference(again, adapters) == 0.0
    stored = safetensors.header(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    inner = MODEL.num_heads * MODEL.head_dim
    assert stored[name.format("A")].shape == (3, inner)
    assert stored[name.format("B")].shape == (MODEL.d_model, 3)
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["r"] == 3 and about["lora_alpha"] == 6.0 and about["peft_type"] == "LORA"
    wrong = dataclasses.replace(MODEL, d_ff=32)
    with pytest.raises(UserError, match=r"lora_[AB]"):
        lora.load(tmp_path / "adapter", wrong)


def _module(name):
    return f"{name}_proj"


def test_a_merged_export_is_a_model(tmp_path):
    merged = lora.merge(params(), trained(), HOW)
    safetensors.save(tmp_path / "model", merged, MODEL)
    _, again = load_weights(tmp_path / "model", jnp.float32)
    assert difference(again, merged) == 0.0


@pytest.mark.live
def test_transformers_reads_the_merged_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    safetensors.save(tmp_path / "model", lora.merge(params(), trained(), HOW), MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    ours = logits(lora.attach(params(), trained(), HOW))
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4


@pytest.mark.live
def test_peft_reads_the_adapters(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    safetensors.save(tmp_path / "base", params(), MODEL)
    lora.save(tmp_path / "adapter", trained(), HOW, MODEL, base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    ours = logits(lora.attach(params(), trained(), HOW))
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rank": 17}, "does not fit"), ({"rank": 0}, "does not fit"),
     ({"rank": 9, "targets": ("k",)}, "a matrix of 16 x 8; give 1 to 8")],
)  # fmt: skip
def test_a_rank_that_does_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        lora.init(jax.random.key(0), MODEL, LoRA(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rank": -1}, "rank=-1"), ({"alpha": 0.0}, "alpha=0"), ({"targets": ()}, "at least one"),
     ({"targets": ("q", "q")}, "once"), ({"targets": ("router",)}, "choose of")],
)  # fmt: skip
def test_configurations_without_a_meaning_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        LoRA(**options)
