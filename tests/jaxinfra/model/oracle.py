"""The same weights and tokens through transformers: the oracle of the model."""

import tempfile

import numpy as np
import torch
import transformers

from jaxinfra.model.config import ModelConfig
from jaxinfra.weights import safetensors

from . import cases


def model(raw: dict, config: ModelConfig) -> transformers.PreTrainedModel:
    """transformers' model of the config.json `raw`, with the weights of `cases`, saved by us."""
    with tempfile.TemporaryDirectory() as folder:
        safetensors.save(folder + "/model", cases.params(config), config)
        hf = transformers.AutoConfig.for_model(**raw)
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder + "/model", config=hf, dtype=torch.float32, attn_implementation="eager",
            output_loading_info=True,
        )  # fmt: skip
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return loaded.eval()


def logits(hf: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray | None = None):
    """[B, T, V] float32; with a mask, positions count real tokens only."""
    ids = torch.from_numpy(tokens).long()
    options = {}
    if mask is not None:
        options["attention_mask"] = torch.from_numpy(mask).long()
        options["position_ids"] = torch.from_numpy(np.maximum(np.cumsum(mask, 1) - 1, 0)).long()
    with torch.no_grad():
        return hf(input_ids=ids, **options).logits.numpy()


def gradients(hf: transformers.PreTrainedModel, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token loss, by parameter name of the checkpoint on disk."""
    ids = torch.from_numpy(tokens).long()
    hf.zero_grad()
    out = hf(input_ids=ids).logits[:, :-1].reshape(-1, hf.config.vocab_size)
    torch.nn.functional.cross_entropy(out.float(), ids[:, 1:].reshape(-1)).backward()
    found = {}
    for name, p in hf.named_parameters():
        grad = np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, (gate, up) in enumerate(np.split(g, 2) for g in grad):
                found[f"{stem}{e}.gate_proj.weight"], found[f"{stem}{e}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            found |= {f"{stem}{e}.down_proj.weight": g for e, g in enumerate(grad)}
        else:
            found[name] = grad
    return found
