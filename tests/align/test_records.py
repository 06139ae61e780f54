"""Records hold the numbers of the update; the page shows them, and nothing a model wrote runs."""

import json
import os
import re

import numpy as np
import pytest

from align import records, rollouts_page
from align.host_loop import HostLoop
from align.rewards import FunctionReward
from tests.align.test_host_loop import loop as host_loop
from tests.align.tiny import CONFIGS, MODEL, TASK, state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps, recorded."""
    folder = tmp_path_factory.mktemp("run")
    loop: HostLoop = host_loop("grpo")
    loop.scorers = (FunctionReward(lambda samples: [float(len(s.answer)) for s in samples]),)
    recorder = records.Recorder(folder, CONFIGS["grpo"], MODEL, groups=2, decode=TASK.decode)
    s, kept = state("grpo"), []
    with open(folder / "metrics.jsonl", "w") as file:
        for number in (1, 2):
            s, metrics, experience = loop.watched_step(s)
            recorder.write(s, experience)
            file.write(json.dumps({"step": number, **metrics}) + "\n")
            kept.append((s, experience))
    return folder, kept, recorder


def test_records_are_the_updates_numbers(run):
    folder, kept, _ = run
    rows = records.read(folder / records.FILE)
    assert len(rows) == 2 * 8 and {row["step"] for row in rows} == {1, 2}
    for number, (_, e) in enumerate(kept):
        for row, i in zip(rows[8 * number :], range(8), strict=False):
            n = int(e.rollout.mask[i].sum())
            assert row["tokens"] == e.rollout.answer[i, :n].tolist()
            assert (row["group"], row["answer"]) == (i // 4, i % 4)
            for name, want in (("sampler", e.rollout.logps), ("advantage", e.advantages)):
                np.testing.assert_allclose(row[name], want[i, :n], atol=1e-6)
            np.testing.assert_allclose(
                row["ratio"], np.exp(np.subtract(row["new"], row["old"])), atol=1e-5
            )
            assert row["reward"] == pytest.approx(float(e.rewards[i]))
            assert all(0 <= x <= np.log(MODEL.vocab_size) + 1e-5 for x in row["entropy"])
            assert len(row["texts"]) == n == len(row["mask"])
    moved = np.concatenate([np.subtract(row["ratio"], 1.0) for row in rows])
    assert 1e-4 < np.abs(moved).max() < 1.0  # the update has changed them


def test_a_resume_removes_later_steps_and_keeps_what_was_before(run, tmp_path):
    folder, _, _ = run
    (tmp_path / records.FILE).write_text((folder / records.FILE).read_text() + '{"step": 3, "gr')
    records.Recorder(tmp_path, CONFIGS["grpo"], MODEL, step=1)
    assert {row["step"] for row in records.read(tmp_path / records.FILE)} == {1}


def test_a_full_disk_costs_the_records_alone(run, tmp_path, caplog):
    _, kept, recorder = run
    full = records.Recorder(tmp_path, CONFIGS["grpo"], MODEL)
    full._measured = recorder._measured
    os.symlink("/dev/full", tmp_path / records.FILE)
    full.write(*kept[0])
    full.write(*kept[1])
    assert full.lost == 2 and caplog.text.count("the run goes on") == 1


def test_the_page_shows_every_token_and_its_numbers(run):
    folder, _, _ = run
    text = rollouts_page.write(folder).read_text()
    rows = records.read(folder / records.FILE)
    spans = re.findall(r'<span class="t[^>]*title="([^"]*)"', text)
    assert len(spans) == sum(len(row["tokens"]) for row in rows)
    assert f"token {rows[0]['tokens'][0]}: " in spans[0]
    for name in ("sampler", "old", "new", "ratio", "advantage", "mask", "entropy"):
        assert f"{name} {rows[0][name][0]:.4g}" in spans[0]
    for name in ("reward", "mismatch_kl", "entropy", "completions/mean_length", "clip_ratio/re"):
        assert name in text
    assert "<script" not in text and "http-equiv=Content-Security-Policy" in text
    assert not re.search(r'(?:src|href)="https?:', text)


def test_what_a_model_wrote_is_text():
    evil = {
        "step": 1, "group": 0, "answer": 0, "reward": None, "stopped": False, "tokens": [7],
        "prompt": "<script>x</script>", "texts": ['"><img src=x onerror=y>'], "mask": [0.0],
        "ratio": [None],
    }  # fmt: skip
    text = rollouts_page.page("<b>", [evil], [])
    assert "<script>" not in text and "<img" not in text and "no reward" in text
    assert "No metrics yet" in text and "t off" in text


def test_a_run_without_records_is_told(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        rollouts_page.write(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        rollouts_page.write(tmp_path / "none")
