"""One small random model of every supported family, as the dictionary of its config.json."""

_BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": _BASE
    | {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "smollm2": _BASE
    | {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
    },
    "mistral": _BASE | {"model_type": "mistral", "sliding_window": 5},
    "qwen2": _BASE | {"model_type": "qwen2", "use_sliding_window": False},
    "qwen3": _BASE | {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma3": _BASE
    | {
        "model_type": "gemma3_text",
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "qwen3_moe": _BASE
    | {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    },
    "mixtral": _BASE | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
}
