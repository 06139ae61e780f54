"""Small models of every family, random parameters, and GGUF files written by llama.cpp's rules."""

import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params, abstract
from jaxinfra.weights.names import hf_tensors

_BASE = {
    "vocab_size": 40,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CONFIGS = {
    family: ModelConfig.from_hf(_BASE | {"model_type": family} | extra)
    for family, extra in {
        "llama": {},
        "mistral": {"sliding_window": 5},
        "qwen2": {},
        "qwen3": {"tie_word_embeddings": True},
        "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8,
                        "sliding_window": 5, "hidden_activation": "gelu_pytorch_tanh"},
        "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                      "norm_topk_prob": True},
        "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    }.items()
}  # fmt: skip
ARCHITECTURES = {  # of GGUF files
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
}


def random_params(config: ModelConfig, dtype=jnp.float32, seed: int = 0) -> Params:
    """Every array random, norms and biases too, so that no two could be taken for one another."""
    draws = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(draws.standard_normal(leaf.shape, np.float32)).astype(dtype),
        abstract(config),
    )


def state_dict(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters under their Hugging Face names."""
    arrays = {}
    for tensor in hf_tensors(config):
        leaf = params
        for name in tensor.path.split("."):
            leaf = getattr(leaf, name)
        arrays[tensor.name] = np.ascontiguousarray(tensor.view(np.asarray(leaf)))
    return arrays


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face name to GGUF name, from the table of the gguf package (not our own)."""
    architecture = ARCHITECTURES[config.family]
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    table = gguf.get_tensor_name_map(kind, config.num_layers)
    names = {}
    for name in (t.name for t in hf_tensors(config)):
        merged = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        stem, _, suffix = merged.rpartition(".")
        names[name] = f"{table.get_name(stem)}.{suffix}"
    return names


def as_llama_cpp_stores(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Names and float32 values of the GGUF file that llama.cpp's converter makes of a model."""
    stored: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    names = gguf_names(config)
    for name, value in state_dict(params, config).items():
        value = value.astype(np.float32)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(
            name.split(".")[-2], 0
        )
        if ARCHITECTURES[config.family] == "llama" and heads:
            halves = value.reshape(heads, 2, config.head_dim // 2, -1)
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if config.family == "gemma3_text" and name.endswith("norm.weight"):
            value = value + 1
        if ".experts." in name:
            experts.setdefault(names[name], []).append(value)
        else:
            stored[names[name]] = value
    return stored | {name: np.stack(values) for name, values in experts.items()}


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
    **metadata: float,
) -> Path:
    """A GGUF file of `tensors`: arrays as they are, or (rows of bytes, type)."""
    architecture = ARCHITECTURES[config.family]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_context_length(config.max_seq_len)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.5] * config.vocab_size)
    if config.experts:
        writer.add_expert_count(config.experts.num_experts)
        writer.add_expert_used_count(config.experts.top_k)
        writer.add_expert_feed_forward_length(config.experts.d_ff)
    if config.windows:
        writer.add_sliding_window(next(w for w in config.windows if w))
    for key, value in metadata.items():
        writer.add_float32(f"{architecture}.{key.replace('__', '.')}", value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
