"""config.json in and out; what is missing, contradictory or damaged is one clear error, at once."""

import json

import pytest

from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from tests.jaxinfra.model_families import CONFIGS

LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_written_reads_as_the_same(family):
    config = ModelConfig.from_hf(CONFIGS[family])
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"model_type": "mamba"}, "model_type 'mamba' is not supported; supported are"),
        ("llama", {"hidden_size": None, "head_dim": None}, "hidden_size=None"),
        ("llama", {"hidden_size": 50, "head_dim": None}, "50 is not a multiple"),
        ("llama", {"num_key_value_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ("llama", {"head_dim": 7}, "head_dim=7 must be even"),
        ("llama", {"vocab_size": -1}, "vocab_size=-1"),
        ("llama", {"vocab_size": True}, "vocab_size=True"),
        ("llama", {"hidden_act": "relu"}, "activation='relu'"),
        ("llama", {"tie_word_embeddings": "false"}, "'false' must be true or false"),
        ("qwen3", {"use_sliding_window": 0}, "use_sliding_window=0 must be true or false"),
        ("qwen3_moe", {"norm_topk_prob": 1.0}, "norm_topk_prob=1.0 must be true or false"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "lacks 'factor'"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, "could not convert"),
        ("llama", {"rope_parameters": 5}, "a wrong value"),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope theta=0.0 must be a positive"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope factor=0.0"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4}},
         "low_freq_factor=4.0 must be less than high_freq_factor=4.0"),
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": -64}},
         "original_max_seq_len=-64 must be a positive integer"),
        ("llama", {"num_key_value_heads": 0}, "num_kv_heads=0 must be a positive integer"),
        ("llama", {"eos_token_id": "x"}, "'x' is given as a token id"),
        ("llama", {"bos_token_id": [1]}, "[1] is given as a token id"),
        ("llama", {"rms_norm_eps": "x"}, "norm_eps='x' must be a positive number"),
        ("llama", {"rms_norm_eps": -1.0}, "norm_eps=-1.0"),
        ("llama", {"num_hidden_layers": 10**9}, "num_layers=1000000000 is more than 10,000"),
        ("qwen2", {"num_hidden_layers": 10**9, "use_sliding_window": True, "sliding_window": 4},
         "num_layers=1000000000 is more than 10,000"),
        ("mistral", {"num_hidden_layers": "4"}, "a wrong value"),
        ("mistral", {"sliding_window": "abc"}, "attention window 'abc' must be a positive integer"),
        ("gemma3", {"query_pre_attn_scalar": None}, "a wrong value"),
        ("gemma3", {"layer_types": ["full_attention"]}, "1 layer_types for 4 layers"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention' is not supp"),
        ("gemma3", {"query_pre_attn_scalar": -256}, "must be a positive number"),
        ("gemma3", {"final_logit_softcapping": "x"}, "logit_soft_cap='x' must be"),
        ("gemma3", {"use_bidirectional_attention": True}, "no decoder"),
        ("mixtral", {"num_local_experts": 1}, "top_k=2 of 1 experts"),
        ("mixtral", {"num_local_experts": "8"}, "num_experts='8' must be a positive integer"),
        ("qwen3_moe", {"moe_intermediate_size": -5}, "d_ff=-5 must be a positive integer"),
        ("qwen3_moe", {"router_aux_loss_coef": float("nan")}, "balance_coef=nan must be 0 or a"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(family, change, words):
    with pytest.raises(UserError) as told:
        ModelConfig.from_hf(CONFIGS[family] | change)
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "a JSON object, not a list"),
        ('{"model_type": "llama"}', "lacks 'hidden_size'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        ModelConfig.from_file(tmp_path)
    assert words in str(told.value) and str(path) in str(told.value)


def test_a_file_that_is_not_there_or_not_a_file(tmp_path):
    with pytest.raises(UserError, match="no such file; a model folder"):
        ModelConfig.from_file(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        ModelConfig.from_file(tmp_path)
    with pytest.raises(UserError):
        ModelConfig.from_file("x" * 300)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    assert ModelConfig.from_file(tmp_path / "good").family == "llama"
