"""Which tensor of a checkpoint is which array of `Params`: Hugging Face and GGUF (llama.cpp) names.

A checkpoint holds one tensor a layer (and one an expert) as [out, in] matrices; `Params` stacks
layers, stores [in, out] and splits heads. `Tensor.view` is the whole conversion, in both
directions: it shows a slot of the stacked array with the shape and order of the file, without
copying, so that assigning to it loads and reading from it saves.

Sources of the names: what `save_pretrained` of transformers 5.23 writes for each family (experts
lie one by one on disk, although transformers 5 fuses them in memory); the table in `gguf.constants`
of the gguf package 0.19; the half-split or interleaved order of rotary dimensions from
`LlamaTensorProcessor` in transformers' `modeling_gguf_pytorch_utils.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np

from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import abstract

# Leading axes of a layer's slot that are inputs; the others are outputs. Not here: stored as is.
_INPUT_AXES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "router": 1,
               "unembed": 1}  # fmt: skip

_HF = {
    "embed": "model.embed_tokens.weight",
    "unembed": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "layers.attn_norm": "input_layernorm.weight",
    "layers.attn.q": "self_attn.q_proj.weight",
    "layers.attn.k": "self_attn.k_proj.weight",
    "layers.attn.v": "self_attn.v_proj.weight",
    "layers.attn.o": "self_attn.o_proj.weight",
    "layers.attn.q_bias": "self_attn.q_proj.bias",
    "layers.attn.k_bias": "self_attn.k_proj.bias",
    "layers.attn.v_bias": "self_attn.v_proj.bias",
    "layers.attn.q_norm": "self_attn.q_norm.weight",
    "layers.attn.k_norm": "self_attn.k_norm.weight",
    "layers.mlp_norm": "post_attention_layernorm.weight",
    "layers.mlp.gate": "mlp.gate_proj.weight",
    "layers.mlp.up": "mlp.up_proj.weight",
    "layers.mlp.down": "mlp.down_proj.weight",
}

_HF_FAMILY = {
    "gemma3_text": {
        "layers.post_attn_norm": "post_attention_layernorm.weight",
        "layers.mlp_norm": "pre_feedforward_layernorm.weight",
        "layers.post_mlp_norm": "post_feedforward_layernorm.weight",
    },
    "qwen3_moe": {
        "layers.mlp.router": "mlp.gate.weight",
        "layers.mlp.gate": "mlp.experts.{expert}.gate_proj.weight",
        "layers.mlp.up": "mlp.experts.{expert}.up_proj.weight",
        "layers.mlp.down": "mlp.experts.{expert}.down_proj.weight",
    },
    "mixtral": {
        "layers.mlp.router": "block_sparse_moe.gate.weight",
        "layers.mlp.gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "layers.mlp.up": "block_sparse_moe.experts.{expert}.w3.weight",
        "layers.mlp.down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
}

_GGUF = {
    "embed": "token_embd.weight",
    "unembed": "output.weight",
    "final_norm": "output_norm.weight",
    "layers.attn_norm": "attn_norm.weight",
    "layers.attn.q": "attn_q.weight",
    "layers.attn.k": "attn_k.weight",
    "layers.attn.v": "attn_v.weight",
    "layers.attn.o": "attn_output.weight",
    "layers.attn.q_bias": "attn_q.bias",
    "layers.attn.k_bias": "attn_k.bias",
    "layers.attn.v_bias": "attn_v.bias",
    "layers.attn.q_norm": "attn_q_norm.weight",
    "layers.attn.k_norm": "attn_k_norm.weight",
    "layers.mlp_norm": "ffn_norm.weight",
    "layers.post_attn_norm": "post_attention_norm.weight",
    "layers.post_mlp_norm": "post_ffw_norm.weight",
    "layers.mlp.gate": "ffn_gate.weight",
    "layers.mlp.up": "ffn_up.weight",
    "layers.mlp.down": "ffn_down.weight",
}

_GGUF_EXPERTS = {
    "layers.mlp.router": "ffn_gate_inp.weight",
    "layers.mlp.gate": "ffn_gate_exps.weight",
    "layers.mlp.up": "ffn_up_exps.weight",
    "layers.mlp.down": "ffn_down_exps.weight",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and its place in `Params`."""

    name: str  # in the file
    path: str  # of the array in Params: "embed", "layers.attn.q"
    index: tuple[int, ...]  # of the slot in that array: (), (layer,) or (layer, expert)
    shape: tuple[int, ...]  # in the file, slowest axis first
    transposed: bool  # the file has [..., out, in], Params [..., in, out]
    interleaved: int = 0  # head width, where rows of a head are in interleaved rotary order
    plus_one: bool = False  # the file holds the value plus one

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """The slot of the stacked array `leaf` as the file shapes it; a view, never a copy."""
        slot = leaf[self.index]
        if not self.transposed:
            return slot.reshape(self.shape)
        *lead, rows, columns = self.shape
        return slot.reshape(*lead, columns, rows).swapaxes(-1, -2)


def hf_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of `config`'s Hugging Face checkpoint, in the order of the leaves of Params."""
    names = _HF | _HF_FAMILY.get(config.family, {})
    for path, shape in leaves(config):
        layered = path.startswith("layers.")
        name = f"model.layers.{{layer}}.{names[path]}" if layered else names[path]
        for index in np.ndindex(shape[: layered + ("{expert}" in name)]):
            places = dict(zip(("layer", "expert"), index, strict=False))
            yield _tensor(name.format(**places), path, index, shape)


def gguf_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of `config`'s GGUF file as llama.cpp's converter writes it.

    The converter permutes q and k of Llama and Mixtral for interleaved rotary embedding, stores
    Gemma's norm weights with the one added, and stacks the experts of a layer.
    """
    names = _GGUF | (_GGUF_EXPERTS if config.experts else {})
    interleaved = config.head_dim if config.family in ("llama", "mixtral") else 0
    for path, shape in leaves(config):
        layered = path.startswith("layers.")
        for index in np.ndindex(shape[:layered]):
            name = f"blk.{index[0]}.{names[path]}" if layered else names[path]
            tensor = _tensor(name, path, index, shape)
            if path in ("layers.attn.q", "layers.attn.k"):
                tensor = dataclasses.replace(tensor, interleaved=interleaved)
            if path.endswith("norm") and config.norm_plus_one:
                tensor = dataclasses.replace(tensor, plus_one=True)
            yield tensor


def leaves(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The dotted path and shape of every array of `config`'s Params, in tree order."""
    for path, shape in jax.tree_util.tree_flatten_with_path(abstract(config))[0]:
        yield ".".join(key.name for key in path), shape.shape


def _tensor(name: str, path: str, index: tuple[int, ...], leaf: tuple[int, ...]) -> Tensor:
    slot, last = leaf[len(index) :], path.rpartition(".")[2]
    inputs = _INPUT_AXES.get(last)
    if inputs is None:
        shape = slot if path == "embed" else (math.prod(slot),)
        return Tensor(name, path, index, shape, transposed=False)
    stacked = ".mlp." in path and len(slot) == 3  # [E, in, out], the experts of a GGUF layer
    lead, matrix = (slot[:1], slot[1:]) if stacked else ((), slot)
    shape = (*lead, math.prod(matrix[inputs:]), math.prod(matrix[:inputs]))
    return Tensor(name, path, index, shape, transposed=True)
