"""Rollouts by decode's engine: rows as any other's, the trainer's word, weights on the way."""

import dataclasses

import jax
import numpy as np
import pytest

from align.array_rewards import GraphReward
from align.engine_rollouts import EngineRollouts
from align.host_loop import HostLoop, generate
from align.logprobs import answer_logps
from align.losses import mismatch_kl
from align.tasks import PAD, STOP
from decode.config import EngineConfig
from jaxinfra.generate import Sampling
from tests.align.tiny import CONFIGS, MODEL, PROBLEMS, STEPS, TASK, params, state

T = 4
CONFIG = dataclasses.replace(
    CONFIGS["grpo"], sampling=Sampling(temperature=0.8, top_p=0.9, top_k=12)
)
ENGINE = EngineConfig(max_len=16, page_size=4, max_running=8, budget=32)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rollouts():
    found = EngineRollouts(CONFIG, MODEL, params(), engine=ENGINE, stride=2)
    yield found
    found.engine.close()


def first():
    return {name: values[:4] for name, values in PROBLEMS.items()}


def trainers(r, weights):
    return answer_logps(weights, MODEL, r.tokens, r.lengths, T, CONFIG.sampling)[0]


def test_rows_are_prompt_answer_and_padding(rollouts):
    rollouts.update_weights(params(), 0)
    r = generate(rollouts, first(), 0, 0)
    assert r.tokens.shape == (16, PROBLEMS["prompts"].shape[1] + T)
    for row in range(16):
        n, m = int(r.lengths[row]), int(r.mask[row].sum())
        assert np.array_equal(r.tokens[row, :n], PROBLEMS["prompts"][row // 4, :n])
        assert np.array_equal(r.tokens[row, n : n + m], r.answer[row, :m]) and m >= 1
        assert np.all(r.tokens[row, n + m :] == PAD) and np.all(r.answer[row, m:] == PAD)
        ends = STOP in r.answer[row, :m].tolist()
        assert bool(r.stopped[row]) == ends and (m == T or ends)
        assert STOP not in r.answer[row, : m - 1].tolist()
    again = generate(rollouts, first(), 0, 0)
    assert np.array_equal(r.answer, again.answer)  # the draws follow from seed and number
    assert not np.array_equal(r.answer, generate(rollouts, first(), 0, 1).answer)
    assert len({r.answer[i].tobytes() for i in range(4)}) > 1  # a group's answers differ


def test_the_engines_word_is_the_trainers_before_and_after_new_weights(rollouts):
    moved = jax.tree.map(lambda a: a * 1.2, params())
    for version, weights in enumerate((params(), moved)):
        rollouts.update_weights(weights, version)
        r = generate(rollouts, first(), 0, 5)
        assert float(mismatch_kl(trainers(r, weights), r.logps, r.mask)) < 1e-9
    assert float(mismatch_kl(trainers(r, params()), r.logps, r.mask)) > 1e-4


def test_weights_change_within_answers(rollouts):
    """Tokens before the change are of the old weights, those after it of the new ones."""
    moved = jax.tree.map(lambda a: a * 1.2, params())
    rollouts.update_weights(params(), 0)
    work = rollouts.begin(first(), 0, 9)
    work = rollouts.advance(work)
    drawn = [len(tokens) for tokens in work.carry.tokens]
    assert not work.done and sum(drawn) > 0
    rollouts.update_weights(moved, 1)
    while not work.done:
        work = rollouts.advance(work)
    r = rollouts.finish(work)
    old = np.abs(trainers(r, params()) - r.logps)
    for row, n in enumerate(drawn):
        assert np.all(old[row, :n] * r.mask[row, :n] < 1e-4)
    assert float((old * r.mask).max()) > 1e-2


def test_the_hosts_loop_learns_from_the_engine(rollouts):
    loop = HostLoop(
        CONFIG, MODEL, PROBLEMS, [GraphReward(TASK.reward)], steps=STEPS, rollouts=rollouts
    )
    s = state("grpo")
    for _ in range(2):
        s, metrics = loop.step(s)
        assert metrics["mismatch_kl"] < 1e-6 and np.isfinite(metrics["loss"])
    assert int(s.step) == 2
