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


def test_wilsons_interval_is_the_published_one_and_holds_at_the_ends():
    low, high = bench.wilson(10, 20)  # Newcombe (1998), method 3
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert bench.wilson(0, 20)[0] == pytest.approx(0.0, abs=1e-12)
    assert bench.wilson(20, 20)[1] == pytest.approx(1.0)


def test_the_gains_interval_is_over_questions_and_not_over_answers():
    right = np.arange(200) % 2 == 0
    tried = lambda right: {"greedy": bench.Tried(right, [])}  # noqa: E731
    runs = [bench.Learnt([], [], {}, tried(~right & False), tried(right), 0.0)] * 4
    mean, low, high = bench.gain(runs, "greedy")
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)  # not of 800


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
    bench.main([str(out), "--model", str(tmp_path / "model"), "--steps", "2", "--prompts", "2",
                "--held-out", "6", "--seeds", "2"])  # fmt: skip
    found = read_all(out)
    assert [e.name for e in found] == ["smollm2-learning-chain-sum", "smollm2-learning-products"]
    for entry in found:
        assert [len(v) for v in entry.samples.values()] == [2] * 4
        assert [len(r) for r in entry.extra["rewards"]] == [2, 2]
        assert entry.extra["samples"][0]["question"].count(":") == 1
    assert (out / "smollm2-learning.svg").read_bytes().startswith(b"<?xml")
    assert "gain   greedy" in capsys.readouterr().out
