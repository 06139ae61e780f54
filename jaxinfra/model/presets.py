"""Configurations of well-known models by short name, for planning and for training from nothing.

Sizes are those of each model's published config.json; no weights come with them. `tiny` is ours: a
byte-level model that a CPU trains in a minute.
"""

from __future__ import annotations

from pathlib import Path

from jaxinfra.errors import UserError
from jaxinfra.model.config import Experts, ModelConfig, Rope

_LLAMA3_ROPE = Rope(5e5, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def _qwen3(**sizes) -> ModelConfig:
    return ModelConfig(
        family="qwen3", vocab_size=151_936, num_kv_heads=8, head_dim=128, max_seq_len=40_960,
        rope=Rope(1e6), qk_norm=True, bos_id=151_643, eos_ids=(151_645,), **sizes,
    )  # fmt: skip


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        family="llama", vocab_size=320, num_layers=6, d_model=192, num_heads=6, num_kv_heads=2,
        head_dim=32, d_ff=512, max_seq_len=1024, tie_embeddings=True,
    ),
    "smollm2-135m": ModelConfig(
        family="llama", vocab_size=49_152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3,
        head_dim=64, d_ff=1536, max_seq_len=8192, norm_eps=1e-5, rope=Rope(1e5),
        tie_embeddings=True, bos_id=1, eos_ids=(2,),
    ),
    "gemma-3-270m": ModelConfig(
        family="gemma3_text", vocab_size=262_144, num_layers=18, d_model=640, num_heads=4,
        num_kv_heads=1, head_dim=256, d_ff=2048, max_seq_len=32_768, rope=Rope(1e6),
        rope_local=Rope(1e4), tie_embeddings=True, qk_norm=True, activation="gelu_tanh",
        attn_scale=256**-0.5, windows=tuple(None if i % 6 == 5 else 512 for i in range(18)),
        norm_plus_one=True, post_norms=True, embed_scale=640**0.5, bos_id=2, eos_ids=(1, 106),
    ),
    "qwen3-0.6b": _qwen3(
        num_layers=28, d_model=1024, num_heads=16, d_ff=3072, tie_embeddings=True
    ),
    "qwen3-1.7b": _qwen3(
        num_layers=28, d_model=2048, num_heads=16, d_ff=6144, tie_embeddings=True
    ),
    "qwen3-8b": _qwen3(num_layers=36, d_model=4096, num_heads=32, d_ff=12_288),
    "qwen3-30b-a3b": ModelConfig(
        family="qwen3_moe", vocab_size=151_936, num_layers=48, d_model=2048, num_heads=32,
        num_kv_heads=4, head_dim=128, d_ff=6144, max_seq_len=40_960, rope=Rope(1e6), qk_norm=True,
        experts=Experts(128, 8, 768, renormalise=True, balance_coef=0.001),
        bos_id=151_643, eos_ids=(151_645,),
    ),
    "llama-3.1-8b": ModelConfig(
        family="llama", vocab_size=128_256, num_layers=32, d_model=4096, num_heads=32,
        num_kv_heads=8, head_dim=128, d_ff=14_336, max_seq_len=131_072, norm_eps=1e-5,
        rope=_LLAMA3_ROPE, bos_id=128_000, eos_ids=(128_001, 128_008, 128_009),
    ),
    "llama-3.1-70b": ModelConfig(
        family="llama", vocab_size=128_256, num_layers=80, d_model=8192, num_heads=64,
        num_kv_heads=8, head_dim=128, d_ff=28_672, max_seq_len=131_072, norm_eps=1e-5,
        rope=_LLAMA3_ROPE, bos_id=128_000, eos_ids=(128_001, 128_008, 128_009),
    ),
    "mixtral-8x7b": ModelConfig(
        family="mixtral", vocab_size=32_000, num_layers=32, d_model=4096, num_heads=32,
        num_kv_heads=8, head_dim=128, d_ff=14_336, max_seq_len=32_768, norm_eps=1e-5,
        rope=Rope(1e6), experts=Experts(8, 2, 14_336, renormalise=True, balance_coef=0.02),
        bos_id=1, eos_ids=(2,),
    ),
}  # fmt: skip


def find(model: str | Path) -> ModelConfig:
    """The configuration of a preset, a config.json, a model's folder or a .gguf file."""
    name = str(model).lower()
    if name in PRESETS:
        return PRESETS[name]
    path = Path(model)
    if path.suffix == ".json":
        return ModelConfig.from_file(path)
    if path.exists():
        from jaxinfra.weights.open import read_config

        return read_config(path)
    raise UserError(
        f"{model}: neither a preset ({', '.join(PRESETS)}) nor a config.json, model folder or "
        ".gguf file"
    )
