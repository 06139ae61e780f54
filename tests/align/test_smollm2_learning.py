"""The benchmark of a real model, with a tiny one in its place: its entries, intervals and order."""

import jax
import numpy as np
import pytest

from benchmarks import smollm2_learning as bench
from jaxinfra.measure import read_all
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from jaxinfra.text.tokenizer import Tokenizer
from jaxinfra.weights import safetensors


def test_the_interval_is_over_questions():
    shares = np.repeat([0.0, 1.0], 100)  # eight equal answers a question
    low, high = bench.interval(shares)
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)  # not of 1600


@pytest.mark.slow
def test_the_whole_command_writes_an_entry_a_task_and_the_curves(tmp_path, capsys):
    words = Tokenizer.byte_level()
    words.save(tmp_path / "words")
    model = ModelConfig(
        family="llama", vocab_size=320, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1,
        head_dim=8, d_ff=24, tie_embeddings=True, max_seq_len=512, eos_ids=words.eos_ids,
    )  # fmt: skip
    safetensors.save(
        tmp_path / "model", P.init(jax.random.key(0), model), model,
        tokenizer_from=tmp_path / "words",
    )  # fmt: skip
    out = tmp_path / "out"
    bench.main([str(out), "--model", str(tmp_path / "model"), "--steps", "1", "--prompts", "2",
                "--held-out", "3", "--seeds", "1"])  # fmt: skip
    found = read_all(out)
    assert [e.name for e in found] == ["smollm2-learning-chain-sum", "smollm2-learning-products"]
    for entry in found:
        assert [len(v) for v in entry.samples.values()] == [1] * 2
        assert [len(r) for r in entry.extra["rewards"]] == [1]
        assert set(entry.extra["held_out_by_step"][0]) == {"0", "1"}
        assert len(entry.extra["interval after"]) == 1
        assert entry.extra["samples"][0]["question"].count(":") == 1
    assert (out / "smollm2-learning.svg").read_bytes().startswith(b"<?xml")
    assert "gain" in capsys.readouterr().out
