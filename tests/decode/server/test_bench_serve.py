"""The load generator against servers whose times are known, and by its definitions."""

import asyncio
import json

import pytest

from decode.bench_serve import Bounds, Call, Sample, load, summary, synthetic, trace
from jaxinfra.errors import UserError
from tests.decode.server.test_app import Made, serving


def run(calls, engine, **options):
    with serving(Made(**engine)) as (url, _):
        return asyncio.run(load(url + "/v1", "m", calls, **options))


def test_times_are_the_engines():
    """Twenty tokens, one every 20 ms at the earliest: E2E is TTFT and nineteen TPOTs."""
    calls = [Call("say:" + "x" * 20, 20)] * 3
    samples, took = run(calls, {"a_step": 1, "pause": 0.02}, concurrency=1)
    for sample in samples:
        assert sample.status == 200 and sample.tokens == 20 and len(sample.gaps) == 19
        assert 0.02 <= sample.ttft < sample.e2e and sample.e2e >= 0.4
        assert sample.ttft + 19 * sample.tpot == pytest.approx(sample.e2e)
        assert sum(sample.gaps) == pytest.approx(19 * sample.tpot) and sample.prompt_tokens == 25
    assert took >= sum(sample.e2e for sample in samples), "the closed loop kept one under way"
    ttft, tpot = max(s.ttft for s in samples), max(s.tpot for s in samples)
    told = summary(samples, took, Bounds(ttft=ttft, tpot=tpot))
    assert told["answered"] == 3 and told["output_tokens"] == 60 and told["cached_tokens"] == 6
    assert told["goodput"] == pytest.approx(told["requests_per_second"])
    fastest = min(s.tpot for s in samples)
    assert summary(samples, took, Bounds(tpot=0.9 * fastest))["goodput"] == 0


def test_the_open_loop_does_not_wait():
    calls = [Call("say:" + "x" * 20, 20, at=0.1 * i) for i in range(4)]
    samples, took = run(calls, {"a_step": 1, "pause": 0.02}, chat=True)
    assert sum(sample.e2e for sample in samples) > took, "requests were not side by side"
    assert took > 0.7


def test_refusals_and_failures_are_counted():
    samples, took = run([Call("say:x", 2)] * 3, {"room": 0}, concurrency=3)
    assert summary(samples, took)["refused"] == 3
    samples, took = run([Call("fail", 2)], {}, concurrency=1)
    told = summary(samples, took)
    assert told["failed"] == 1 and "scripted failure" in told["errors"][0]
    samples, took = asyncio.run(load("http://127.0.0.1:1/v1", "m", [Call("x", 1)]))
    assert summary(samples, took)["failed"] == 1


def test_a_synthetic_load():
    calls = synthetic(400, words=5, answer=7, prefixes=3, shared=20, rate=50.0, seed=1)
    assert calls == synthetic(400, words=5, answer=7, prefixes=3, shared=20, rate=50.0, seed=1)
    assert len({call.prompt for call in calls}) == 400
    assert len({call.prompt.rsplit(":", 1)[0].rsplit(" ", 1)[0] for call in calls}) == 3
    assert calls[-1].at == pytest.approx(8.0, rel=0.2), "50 a second"
    assert {call.at for call in synthetic(3, words=1, answer=1)} == {0.0}


def test_a_trace(tmp_path):
    rows = [
        {"timestamp": 4, "prompt_tokens": 10, "max_tokens": 3, "prefix": 7},
        {"timestamp": 2, "prompt_tokens": 10, "max_tokens": 3, "prefix": 7},
        {"timestamp": 0, "prompt": "hi", "max_tokens": 1},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    calls = trace(path, speed=2.0)
    assert [call.at for call in calls] == [0, 1, 2] and calls[0].prompt == "hi"
    first, second = (call.prompt.split() for call in calls[1:])
    assert first[:5] == second[:5] and first != second and len(first) == 10
    path.write_text('{"timestamp": 1}')
    with pytest.raises(UserError, match=r"trace\.jsonl:1"):
        trace(path)


def test_fields_by_their_definitions():
    samples = [
        Sample(200, tokens=5, ttft=1.0, e2e=3.0, gaps=[0.5] * 4),
        Sample(200, tokens=1, ttft=2.0, e2e=2.0),
        Sample(429),
        Sample(0, error="x"),
    ]
    told = summary(samples, 4.0, Bounds(ttft=1.5))
    assert told["tpot"]["mean"] == 0.5 and told["ttft"]["median"] == 1.5
    assert told["output_tokens_per_second"] == 1.5 and told["goodput"] == 0.25
    assert (told["answered"], told["refused"], told["failed"]) == (2, 1, 1)
