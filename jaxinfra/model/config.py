"""The configuration of a decoder-only transformer, read from a Hugging Face `config.json`.

One dataclass describes every supported family; what differs between them is a field here, never a
subclass. `ModelConfig.from_hf` reads a config.json dictionary (transformers 4 and 5 spell rope
differently; both are read) and `to_hf` writes one that transformers loads.

Sources of the field semantics: the `configuration_*.py` and `modeling_*.py` files of transformers
5.23 for llama, mistral, qwen2, qwen3, qwen3_moe, mixtral and gemma3_text.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfra.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "qwen3_moe", "mixtral")

MOST_LAYERS = 10_000  # a guard: a damaged file's number must not become hours of work


def _whole(what: str, values: Any, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        if type(value) is not int or value < 1:
            raise UserError(f"config: {what}{name}={value!r} must be a positive integer")


def _positive(what: str, values: Any, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"config: {what}{name}={value!r} must be a positive number")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta`, with Llama 3's or linear frequency scaling."""

    theta: float = 10_000.0
    kind: str = "default"  # "default", "linear" or "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        _positive("rope ", self, "theta", "factor", "low_freq_factor", "high_freq_factor")
        _whole("rope ", self, "original_max_seq_len")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"config: rope low_freq_factor={self.low_freq_factor} must be less than "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture-of-experts feed-forward: E experts of width F, `top_k` of them a token."""

    num_experts: int
    top_k: int
    d_ff: int
    renormalise: bool  # divide the chosen probabilities by their sum
    balance_coef: float  # weight of the load-balance loss in training

    def __post_init__(self) -> None:
        _whole("experts ", self, "num_experts", "top_k", "d_ff")
        if self.top_k > self.num_experts:
            raise UserError(f"config: top_k={self.top_k} of {self.num_experts} experts")
        if not 0 <= self.balance_coef < math.inf:
            raise UserError(
                f"config: experts balance_coef={self.balance_coef} must be 0 or a positive number"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder-only transformer.

    Letters: V vocabulary, L layers, D model width, N query heads, K key/value heads, H head width,
    F feed-forward width, E experts.
    """

    family: str
    vocab_size: int  # V
    num_layers: int  # L
    d_model: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    d_ff: int  # F, of the dense feed-forward
    max_seq_len: int = 4096
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    rope_local: Rope | None = None  # of windowed layers, where it differs (Gemma 3)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"  # "silu" or "gelu_tanh"
    attn_scale: float | None = None  # None: 1/sqrt(H)
    logit_soft_cap: float | None = None
    windows: tuple[int | None, ...] | None = None  # one a layer; None: all attend to everything
    norm_plus_one: bool = False  # Gemma stores the norm's weight minus one
    post_norms: bool = False  # Gemma 3 norms each block's output as well
    embed_scale: float | None = None  # Gemma multiplies embeddings by sqrt(D)
    experts: Experts | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    norms: str | None = None  # what runs them, and rotation in training: of IMPLEMENTATIONS

    def __post_init__(self) -> None:
        _whole("", self, "vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads",
               "head_dim", "d_ff", "max_seq_len")  # fmt: skip
        _positive("", self, "norm_eps")
        for name in ("attn_scale", "logit_soft_cap", "embed_scale"):
            if getattr(self, name) is not None:
                _positive("", self, name)
        if self.num_layers > MOST_LAYERS:
            raise UserError(f"config: num_layers={self.num_layers} is more than {MOST_LAYERS:,}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"config: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"config: head_dim={self.head_dim} must be even for rotary embedding")
        if self.activation not in ("silu", "gelu_tanh"):
            raise UserError(f"config: activation={self.activation!r} is not 'silu' or 'gelu_tanh'")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise UserError(
                f"config: {len(self.windows)} attention windows for {self.num_layers} layers"
            )
        for window in self.windows or ():
            if window is not None and (type(window) is not int or window < 1):
                raise UserError(f"config: attention window {window!r} must be a positive integer")
        for token in (self.bos_id, *self.eos_ids):
            if token is not None and type(token) is not int:
                raise UserError(f"config: {token!r} is given as a token id; ids are integers")

    @property
    def scale(self) -> float:
        """The factor on query-key products."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    def window(self, layer: int) -> int | None:
        """Keys that layer `layer` may look back on, itself included; None for all."""
        return self.windows[layer] if self.windows else None

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads a `config.json`, or the one inside the folder `path`."""
        path = Path(path)
        try:
            path = path / "config.json" if path.is_dir() else path
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a model folder needs a config.json") from None
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; give a model folder or config.json"
            ) from None
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
            raise UserError(f"{path}: not valid JSON ({error}); fetch the file again") from None
        try:
            return cls.from_hf(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads the dictionary of a Hugging Face `config.json`; a UserError says what it lacks."""
        from jaxinfra.model import hf_config

        return hf_config.read(raw)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a `config.json` that transformers 5 reads as this model."""
        from jaxinfra.model import hf_config

        return hf_config.write(self)
