"""GGUF files of llama.cpp as `ModelConfig` and `Params`: quantised weights are dequantised.

A file is read a block of rows at a time, dequantised by the gguf package to float32 and stored in
the target dtype, so host memory peaks as in `jaxinfra.weights.assemble`. Architectures: llama (with
Mistral and Mixtral, which llama.cpp stores as such), qwen2, qwen3, qwen3moe, gemma3.

Sources: metadata keys from `gguf.constants` of the gguf package 0.19; the factors in
`rope_freqs.weight` from `Llama3Model` in llama.cpp's converter and `_compute_llama3_parameters` in
transformers 5.23; what a gemma3 file leaves out from `src/models/gemma3.cpp` of llama.cpp.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.weights.assemble import assemble, check
from jaxinfra.weights.gguf_header import Header, read_header, row_bytes
from jaxinfra.weights.names import Tensor, gguf_tensors

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
}
_KEYS = {  # of config.json: the key after the architecture's name
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_SIZES = {"embedding_length", "block_count", "attention.head_count", "attention.head_count_kv",
          "attention.key_length", "feed_forward_length", "context_length", "expert_used_count",
          "expert_feed_forward_length"}  # fmt: skip
_GEMMA3_27B_LAYERS = 62  # llama.cpp tells the one model with another query scale by its depth


def read_config(path: str | Path) -> ModelConfig:
    """The configuration in a GGUF file's metadata; raises UserError on what it lacks."""
    return _config(Path(path), read_header(path))


def load(path: str | Path, dtype: Any, sharding: Any = None) -> Params:
    """Reads and dequantises the GGUF file `path` as Params in `dtype`.

    `sharding` is as in `jaxinfra.weights.assemble.assemble`. Raises UserError naming the file when
    it is truncated, holds tensor types outside `TYPES` or not the tensors its metadata tells of.
    """
    path = Path(path)
    header = read_header(path)
    config = _config(path, header)
    found = {n: s.shape for n, s in header.tensors.items() if n != "rope_freqs.weight"}
    tensors = check(path, gguf_tensors(config), found)
    for name, stored in header.tensors.items():
        if stored.type.name not in TYPES:
            raise UserError(
                f"{path}: tensor {name} is of type {stored.type.name}; supported are "
                f"{', '.join(TYPES)}; fetch another quantisation of the model"
            )
    with open(path, "rb") as stream:

        def read_rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
            stored = header.tensors[tensor.name]
            stream.seek(stored.offset + start * row_bytes(stored))
            raw = np.frombuffer(stream.read((stop - start) * row_bytes(stored)), np.uint8)
            rows = _dequantise(raw.reshape(stop - start, -1), stored.type)
            if tensor.interleaved:  # one head: pairs (2i, 2i+1) become (i, i + H/2)
                rows = np.concatenate([rows[0::2], rows[1::2]])
            return rows - 1 if tensor.plus_one else rows

        return assemble(config, tensors, dtype, read_rows, sharding)


def _dequantise(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of bytes as float32 rows."""
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    if plain:
        return rows.view(plain).astype(np.float32)
    return quants.dequantize(rows, kind)


def _config(path: Path, header: Header) -> ModelConfig:
    try:
        return ModelConfig.from_hf(_raw_config(path, header))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: damaged metadata ({error}); fetch the file again") from None


def _raw_config(path: Path, header: Header) -> dict[str, Any]:
    """The metadata as the dictionary of a config.json."""
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise UserError(
            f"architecture {architecture!r} is not supported; supported are {', '.join(_FAMILIES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"one of {metadata['split.count']} parts; merge them to one file")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    missing = [f"{architecture}.{key}" for key in _KEYS.values() if key not in own]
    missing += ["token_embd.weight"] if "token_embd.weight" not in tensors else []
    if missing:
        raise UserError(f"lacks {missing[0]!r}; the file is incomplete, fetch another")
    for key in _SIZES & own.keys():
        if type(own[key]) is not int or own[key] < 1:
            raise UserError(f"{architecture}.{key}={own[key]!r} is no positive integer")
    if own["block_count"] > len(tensors):  # before anything is done for each block
        raise UserError(f"{own['block_count']:,} blocks of {len(tensors)} tensors; fetch it again")
    raw = {name: own[key] for name, key in _KEYS.items()}
    family = _FAMILIES[architecture]
    head_dim = own.get("attention.key_length") or raw["hidden_size"] // raw["num_attention_heads"]
    if own.get("rope.dimension_count", head_dim) != head_dim:
        raise UserError("rotary embedding of a part of each head is not supported")
    raw |= {
        "model_type": "mixtral" if family == "llama" and own.get("expert_count") else family,
        "head_dim": head_dim,
        "num_key_value_heads": own.get("attention.head_count_kv"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": next(iter(_ids(metadata, "bos")), None),
        "eos_token_id": _ids(metadata, "eos", "eot"),  # end of text, and of a turn
        "rope_parameters": _rope(path, header, own, head_dim),
    }
    if own.get("expert_count"):
        raw |= {
            "num_local_experts": own["expert_count"],
            "num_experts": own["expert_count"],
            "num_experts_per_tok": own.get("expert_used_count", 0),
            "moe_intermediate_size": own.get(
                "expert_feed_forward_length", own[_KEYS["intermediate_size"]]
            ),
            "norm_topk_prob": True,
        }
    if family == "gemma3_text":
        wide = raw["num_hidden_layers"] == _GEMMA3_27B_LAYERS
        query_width = raw["hidden_size"] // raw["num_attention_heads"] if wide else head_dim
        raw |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": own.get("attention.sliding_window"),
            "query_pre_attn_scalar": query_width,
            "final_logit_softcapping": own.get("final_logit_softcapping"),
            "rope_parameters": {
                "full_attention": raw["rope_parameters"],
                "sliding_attention": {"rope_theta": own.get("rope.freq_base_swa", 1e4)},
            },
        }
    return raw


def _ids(metadata: dict[str, Any], *names: str) -> list[int]:
    """The ids of those special tokens that the file names."""
    found = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
    ids = list(dict.fromkeys(i for i in found if i is not None))
    if any(type(i) is not int or i < 0 for i in ids):
        raise UserError(f"{' or '.join(names)}_token_id={ids} is no token id; fetch it again")
    return ids


def _rope(path: Path, header: Header, own: dict[str, Any], head_dim: int) -> dict[str, Any]:
    theta = own.get("rope.freq_base", 10_000.0)
    kind = own.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        return _llama3_rope(path, header, theta, head_dim)
    if kind == "linear":
        return {"rope_type": kind, "rope_theta": theta, "factor": own.get("rope.scaling.factor")}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    raise UserError(f"rope scaling {kind!r} is not supported; linear and llama3 are")


def _llama3_rope(path: Path, header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling of which a Llama 3 file holds only the result: a divisor for each frequency."""
    stored = header.tensors["rope_freqs.weight"]
    if stored.shape != (head_dim // 2,) or stored.type.name != "F32":
        raise UserError(f"rope_freqs.weight is not {head_dim // 2:,} numbers of type F32")
    divisors = np.fromfile(path, np.float32, head_dim // 2, offset=stored.offset)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UserError("the rope scaling in rope_freqs.weight is not that of Llama 3")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
