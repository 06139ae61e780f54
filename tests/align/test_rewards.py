"""Scorers of every kind give the same numbers, and each failure costs its own answers alone."""

import asyncio
import threading
import time

import jax
import numpy as np
import pytest

from align.array_rewards import GraphReward, ModelReward
from align.process_rewards import ProcessReward
from align.reward_server import make_server
from align.rewards import Answers, FunctionReward, HTTPReward, as_json, sample_of, score
from align.rollout import Rollout
from align.value_model import ValueModel, sequence_scores
from tests.align import rewarders
from tests.align.tiny import MODEL, TASK, params

T = 4


def batch(lengths=(0, 1, 2, 3, 4, 3)):
    """Answers of these many tokens; all but those of T tokens have ended by themselves."""
    B = len(lengths)
    problems = TASK.problems(B, seed=0)
    answer = np.zeros((B, T), np.int32)
    mask = np.zeros((B, T), np.float32)
    for i, n in enumerate(lengths):
        wanted = problems["answer"][i, : problems["answer_length"][i]]
        row = list(wanted[:n]) + [5] * (n - len(wanted[:n])) + [1]
        answer[i, : len(row[:T])] = row[:T]
        mask[i, : min(n + 1, T)] = 1
    stopped = np.asarray([n < T for n in lengths], np.float32)
    P = problems["prompts"].shape[1]
    tokens = np.zeros((B, P + T), np.int32)
    for i, n in enumerate(problems["lengths"]):
        tokens[i, :n] = problems["prompts"][i, :n]
        tokens[i, n : n + T] = answer[i]
    r = Rollout(tokens, problems["lengths"], answer, mask, np.zeros_like(mask), stopped)
    return Answers(r, problems)


def lengths_of(samples):
    return [float(len(s.answer)) for s in samples]


async def slow_for_long(sample):
    await asyncio.sleep(60.0 if len(sample.answer) == 3 else 0.01)
    if len(sample.answer) == 4:
        raise RuntimeError("no")
    return float(len(sample.answer))


@pytest.fixture(scope="module")
def server():
    calls = []

    def function(samples):
        calls.append(len(samples))
        if len(calls) == 2:
            raise RuntimeError("busy")
        return [None if len(s.answer) == 2 else float(len(s.answer)) for s in samples]

    found = make_server(function)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{found.server_address[1]}"
    found.shutdown()
    found.server_close()


def test_samples_are_the_rows():
    answers = batch()
    for i, sample in enumerate(answers.samples):
        assert TASK.decode(sample.prompt).endswith("=")
        assert len(sample.answer) == (0, 1, 2, 3, 4, 3)[i] and sample.stopped == (i != 4)
        assert np.array_equal(sample.problem["answer"], answers.problems["answer"][i])
        assert sample_of(as_json(sample)).answer == sample.answer


def test_functions_and_coroutines_give_their_numbers_and_lose_the_late_ones():
    answers = batch()
    rewards, told = score(
        [FunctionReward(lengths_of), FunctionReward(slow_for_long, timeout=3.0)], answers
    )
    np.testing.assert_array_equal(rewards[:, 0], [0, 1, 2, 3, 4, 3])
    np.testing.assert_array_equal(rewards[:, 1], [0, 1, 2, np.nan, np.nan, np.nan])
    assert told["rewards/slow_for_long/late"] == 2 and told["rewards/slow_for_long/raised"] == 1
    assert told["rewards/lengths_of/mean"] == pytest.approx(13 / 6)
    assert told["rewards/slow_for_long/mean"] == 1.0


def test_processes_lose_one_sample_to_a_hang_a_crash_and_an_error():
    scorer = ProcessReward(rewarders.moody, workers=2, timeout=5.0)
    try:
        rewards, told = score([scorer], batch())
        np.testing.assert_array_equal(rewards[:, 0], [np.nan, np.nan, np.nan, 3, 4, 3])
        assert {k.rpartition("/")[2]: v for k, v in told.items() if not k.endswith(("mean", "std"))
                } == {"late": 1, "crashed": 1, "raised": 1}  # fmt: skip
        again, told = score([scorer], batch((3, 3, 4)))  # those that were killed are replaced
        np.testing.assert_array_equal(again[:, 0], [3, 3, 4])
        assert "rewards/moody/late" not in told
    finally:
        scorer.close()


def test_a_server_is_asked_again(server):
    scorer = HTTPReward(server)
    for expected in (None, 1.0):
        rewards, told = score([scorer], batch())
        np.testing.assert_array_equal(rewards[:, 0], [0, 1, np.nan, 3, 4, 3])
        assert told.get("rewards/http/asked_again") == expected


def test_a_server_that_is_not_there_costs_its_column():
    rewards, told = score([HTTPReward("http://127.0.0.1:9", attempts=1)], batch())
    assert np.isnan(rewards).all() and told["rewards/http/raised"] == 6


@pytest.mark.parametrize(
    ("function", "kind", "lost"),
    [(lambda samples: 1 / 0, "raised", 6), (lambda samples: time.sleep(3), "late", 6),
     (lambda samples: [1.0], "wrong_count", 6), (lambda samples: 1.0, "raised", 6),
     (lambda samples: ["a"] * 6, "raised", 6),
     (lambda samples: [float("nan"), float("inf"), None, 1.0, 1.0, 1.0], "not_finite", 2)],
    ids=["raises", "hangs", "wrong count", "no list", "no numbers", "nan"],
)  # fmt: skip
def test_what_functions_do_wrong(function, kind, lost):
    good = FunctionReward(lengths_of)
    timeout = 0.3 if kind == "late" else 60.0
    rewards, told = score([FunctionReward(function, timeout=timeout, name="bad"), good], batch())
    assert told[f"rewards/bad/{kind}"] == lost
    assert np.isnan(rewards[:, 0]).sum() == (3 if kind == "not_finite" else 6)
    assert np.array_equal(rewards[:, 1], [0, 1, 2, 3, 4, 3])


def test_array_programs_score_too():
    answers = batch()
    model = ValueModel(params(), np.ones(MODEL.d_model, np.float32), np.float32(0.5))
    model = jax.tree.map(jax.numpy.asarray, model)
    rewards, _ = score([GraphReward(TASK.reward), ModelReward(model, MODEL)], answers)
    np.testing.assert_array_equal(rewards[:, 0], TASK.reward(answers.rollout, answers.problems))
    r = answers.rollout
    ends = (r.lengths + r.mask.sum(1)).astype(np.int32)
    want = sequence_scores(model, MODEL, r.tokens, ends)
    np.testing.assert_allclose(rewards[:, 1], want, atol=1e-5)
    assert len(set(np.round(rewards[:, 1], 4).tolist())) > 3


def test_an_address_without_a_scheme_is_refused():
    with pytest.raises(ValueError, match="give one as http://HOST:PORT"):
        HTTPReward("localhost:80")
