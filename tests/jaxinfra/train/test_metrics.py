"""Metrics: lines that are whole JSON, resumed files, rates, TensorBoard where it is installed."""

import json
import types
from pathlib import Path

import pytest

from jaxinfra.errors import UserError
from jaxinfra.train import metrics
from jaxinfra.train.metrics import Meter, MetricsLog, peak_memory, read_metrics


def test_a_line_is_there_as_soon_as_it_is_written_and_holds_no_nan(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "skipped": 1})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": None, "skipped": 1,
    }  # fmt: skip
    log.close()


def test_a_resumed_file_loses_later_lines_and_damaged_ones(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n5\n\xff\n{"step": 2}\n{"no": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "loss": 1.0})
    log.close()
    assert read_metrics(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    MetricsLog(tmp_path, 0).close()
    assert read_metrics(file) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_once_and_names_the_file(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log._stream.close()
    log._stream = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full .* another --out"):
        log.write({"step": 1})
    log.close()


def test_rates_are_over_the_last_interval_of_wall_time(monkeypatch):
    clock = types.SimpleNamespace(now=10.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    meter = Meter(2, flops_per_token=3.0, peak_flops=600.0)
    clock.now = 11.0
    assert meter.add(100) == {}
    clock.now = 14.0
    rates = meter.add(100)
    assert rates["tokens_per_s"] == 50.0 and rates["mfu"] == 0.25
    clock.now = 100.0  # an evaluation
    meter.restart()
    clock.now = 101.0
    assert meter.add(100) == rates
    clock.now = 102.0
    assert meter.add(300)["tokens_per_s"] == 200.0


def test_without_a_known_peak_there_is_no_utilisation():
    assert "mfu" not in Meter(1, 3.0, None).add(10)


def test_memory_is_what_this_process_held():
    assert 10e6 < peak_memory() < 1e12


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 5.0), (1, 4.0)):  # the second run resumes after step 1
        log = MetricsLog(tmp_path, start)
        for step in range(start + 1, 4):
            log.write({"step": step, "loss": value, "sample": "text"})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 5.0), (2, 4.0), (3, 4.0)]
