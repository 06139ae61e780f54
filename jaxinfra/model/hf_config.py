"""A Hugging Face `config.json` as a ModelConfig and back.

transformers 4 and 5 spell rotary embeddings differently; both are read, and 5 is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfra.errors import UserError
from jaxinfra.model.config import FAMILIES, MOST_LAYERS, Experts, ModelConfig, Rope

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}

_SWITCHES = ("attention_bias", "mlp_bias", "norm_topk_prob", "tie_word_embeddings",
             "use_bidirectional_attention", "use_sliding_window")  # fmt: skip


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """The model that the dictionary describes; a UserError says what it lacks or has wrong."""
    if not isinstance(raw, Mapping):
        raise UserError(f"a model's configuration is a JSON object, not a {type(raw).__name__}")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    try:
        return _read(family, raw)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"config.json of a {family} model lacks {error.args[0]!r}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"config.json of a {family} model: a wrong value ({error})") from None


def _read(family: str, raw: Mapping[str, Any]) -> ModelConfig:
    for switch in _SWITCHES:
        if not isinstance(value := raw.get(switch), bool | None):
            raise UserError(f"config: {switch}={value!r} must be true or false")
    d_model, num_heads = raw["hidden_size"], raw["num_attention_heads"]
    head_dim = raw.get("head_dim")
    if head_dim is None:
        if not isinstance(d_model, int) or not isinstance(num_heads, int) or num_heads < 1:
            raise UserError(f"config: hidden_size={d_model!r}, num_attention_heads={num_heads!r}")
        if d_model % num_heads:
            raise UserError(
                f"config: hidden_size={d_model} is not a multiple of "
                f"num_attention_heads={num_heads}, and there is no head_dim"
            )
        head_dim = d_model // num_heads
    if raw.get("use_bidirectional_attention"):
        raise UserError("config: use_bidirectional_attention=true is not supported: no decoder")
    for switch in ("mlp_bias", "attention_bias"):
        if raw.get(switch) and not (switch == "attention_bias" and family == "qwen2"):
            raise UserError(f"config: {switch}=true is not supported for {family}")
    gemma = family == "gemma3_text"
    if family == "mixtral":  # its defaults, where a config.json leaves them out
        raw = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, **raw}
    rope, rope_local = _read_rope(raw, gemma)
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    activation = {"gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation)
    eos = raw.get("eos_token_id")
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads if (kv := raw.get("num_key_value_heads")) is None else kv,
        head_dim=head_dim,
        d_ff=raw["intermediate_size"],
        max_seq_len=raw.get("max_position_embeddings", 4096),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=rope,
        rope_local=rope_local,
        tie_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        activation=activation,
        attn_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5 if gemma else None,
        logit_soft_cap=raw.get("final_logit_softcapping") if gemma else None,
        windows=_read_windows(family, raw),
        norm_plus_one=gemma,
        post_norms=gemma,
        embed_scale=float(d_model) ** 0.5 if gemma else None,
        experts=_read_experts(family, raw),
        bos_id=raw.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _read_rope(raw: Mapping[str, Any], gemma: bool) -> tuple[Rope, Rope | None]:
    """Rope of full layers and, for Gemma 3, of windowed ones; from transformers 4 or 5 spelling."""
    new = raw.get("rope_parameters")
    if gemma:
        if new:
            return _rope(new["full_attention"], 1e6), _rope(new["sliding_attention"], 1e4)
        full = {"rope_theta": raw.get("rope_theta", 1e6), **(raw.get("rope_scaling") or {})}
        return _rope(full, 1e6), Rope(theta=raw.get("rope_local_base_freq", 1e4))
    return _rope(new or {"rope_theta": raw.get("rope_theta", 10_000.0),
                         **(raw.get("rope_scaling") or {})}, 10_000.0), None  # fmt: skip


def _rope(raw: Mapping[str, Any], theta: float) -> Rope:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    theta = float(raw.get("rope_theta", theta))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=float(raw["factor"]))
    if kind == "llama3":
        return Rope(
            theta=theta,
            kind=kind,
            factor=float(raw["factor"]),
            low_freq_factor=float(raw["low_freq_factor"]),
            high_freq_factor=float(raw["high_freq_factor"]),
            original_max_seq_len=int(raw["original_max_position_embeddings"]),
        )
    raise UserError(f"config: rope_type {kind!r} is not supported; use default, linear or llama3")


def _read_windows(family: str, raw: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    default = 4096 if family in ("mistral", "gemma3_text") else None
    window, layers = raw.get("sliding_window", default), raw["num_hidden_layers"]
    qwen = family.startswith("qwen")
    if window is None or family == "llama" or (qwen and not raw.get("use_sliding_window")):
        return None
    if layers > MOST_LAYERS:
        return None  # and ModelConfig refuses it
    mixed = family in ("qwen2", "qwen3", "gemma3_text")  # of the others all layers are alike
    kinds = raw.get("layer_types") if mixed else ["sliding_attention"] * layers
    if kinds is None:
        if family == "gemma3_text":
            period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
            kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention"
                     for i in range(layers)]  # fmt: skip
        else:
            start = raw.get("max_window_layers", 28)
            kinds = ["sliding_attention" if i >= start else "full_attention" for i in range(layers)]
    if len(kinds) != layers:
        raise UserError(f"config: {len(kinds)} layer_types for {layers} layers")
    if unknown := {*kinds} - {"full_attention", "sliding_attention"}:
        raise UserError(f"config: layer_types {min(unknown)!r} is not supported")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else None


def _read_experts(family: str, raw: Mapping[str, Any]) -> Experts | None:
    if family == "qwen3_moe":
        if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
            raise UserError("config: a qwen3_moe model with dense layers between is not supported")
        return Experts(
            num_experts=raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"],
            top_k=raw["num_experts_per_tok"],
            d_ff=raw["moe_intermediate_size"],
            renormalise=bool(raw.get("norm_topk_prob", False)),
            balance_coef=float(raw.get("router_aux_loss_coef", 0.001)),
        )
    if family == "mixtral":
        return Experts(
            num_experts=raw["num_local_experts"],
            top_k=raw["num_experts_per_tok"],
            d_ff=raw["intermediate_size"],
            renormalise=True,
            balance_coef=float(raw.get("router_aux_loss_coef", 0.001)),
        )
    return None


def write(c: ModelConfig) -> dict[str, Any]:
    """The dictionary of a config.json that transformers 5 reads as this model."""
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_ff,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_parameters": _write_rope(c.rope),
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_ids) if len(c.eos_ids) > 1 else next(iter(c.eos_ids), None),
    }
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation)
    raw["hidden_activation" if c.family == "gemma3_text" else "hidden_act"] = activation
    window = next((w for w in c.windows or () if w), None)
    raw["sliding_window"] = window
    if c.family.startswith("qwen") or c.family == "gemma3_text":
        raw["layer_types"] = [
            "sliding_attention" if c.window(i) else "full_attention" for i in range(c.num_layers)
        ]
    if c.family.startswith("qwen"):
        raw["use_sliding_window"] = window is not None
    if c.family == "gemma3_text":
        raw["sliding_window"] = window or c.max_seq_len
        raw["query_pre_attn_scalar"] = round(c.scale**-2)
        raw["final_logit_softcapping"] = c.logit_soft_cap
        raw["rope_parameters"] = {
            "full_attention": _write_rope(c.rope),
            "sliding_attention": _write_rope(c.rope_local or c.rope),
        }
    if c.experts and c.family == "qwen3_moe":
        raw |= {"num_experts": c.experts.num_experts, "moe_intermediate_size": c.experts.d_ff,
                "norm_topk_prob": c.experts.renormalise, "mlp_only_layers": []}  # fmt: skip
    if c.experts and c.family == "mixtral":
        raw |= {"num_local_experts": c.experts.num_experts}
    if c.experts:
        raw |= {"num_experts_per_tok": c.experts.top_k,
                "router_aux_loss_coef": c.experts.balance_coef}  # fmt: skip
    return raw


def _write_rope(rope: Rope) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        raw["factor"] = rope.factor
    if rope.kind == "llama3":
        raw |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_seq_len}  # fmt: skip
    return raw
