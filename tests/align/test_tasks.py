"""Rewards in the graph on reasoning-gym's own scores, for right, wrong and malformed answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align.rollout import Rollout
from align.tasks import PAD, STOP, TASKS

reasoning_gym = pytest.importorskip("reasoning_gym")
T = 9


def answers(task, answer: str, rng) -> str:
    """The answer, or something near it, or anything."""
    kind = rng.integers(6)
    text = list(answer)
    if kind == 1 and text:
        text[rng.integers(len(text))] = rng.choice(list(task.alphabet))
    elif kind == 2:
        text.insert(rng.integers(len(text) + 1), rng.choice(list(task.alphabet)))
    elif kind == 3 and text:
        del text[rng.integers(len(text))]
    elif kind == 4:
        text = list(rng.choice(list(task.alphabet), rng.integers(0, T + 1)))
    elif kind == 5:
        text = text + text[: rng.integers(0, 4)]
    return "".join(text)[:T]


def rows(task, texts):
    """A rollout whose answers are the texts; those of T characters never stopped."""
    answer = np.full((len(texts), T), PAD, np.int32)
    mask, stopped = np.zeros((len(texts), T), np.float32), np.zeros(len(texts), np.float32)
    for i, text in enumerate(texts):
        tokens = [*task.encode(text), STOP][:T]
        answer[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        stopped[i] = STOP in tokens
    nothing = jnp.zeros((len(texts), 1), jnp.int32)
    return Rollout(nothing, nothing[:, 0], *map(jnp.asarray, (answer, mask, mask, stopped)))


EDGES = {
    "chain_sum": ["", "-", "+", "-0", "007", "+5", "--5", "5-", "5=", "000000000"],
    "spell_backward": ["", "=", "aaaaaaaaa"],
    "number_sorting": ["", ",", ",,", "1,,2", "-,1,2", "+1,2,3", "1,2,3,", "3,2,1", "1=2,3,4"],
}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_rewards_are_reasoning_gyms(name):
    task, rng = TASKS[name], np.random.default_rng(0)
    dataset = reasoning_gym.create_dataset(name, size=1, seed=0)
    problems = [task.draw(rng) for _ in range(1500)]
    texts = [answers(task, answer, rng) for _, answer, _ in problems]
    texts[: len(EDGES[name])] = EDGES[name]
    want = [
        dataset.score_answer(task.render(text), entry)
        for text, (_, _, entry) in zip(texts, problems, strict=True)
    ]
    packed = jax.tree.map(jnp.asarray, task.pack(problems))
    got = np.asarray(jax.jit(task.reward)(rows(task, texts), packed))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert 0.1 < np.mean(got == 1.0) < 0.9 and np.any(got == 0.0)
    for (prompt, answer, _), text in zip(problems[:50], texts[:50], strict=True):
        assert task.decode(task.encode(prompt + answer)) == prompt + answer
        assert task.decode([*task.encode(text), STOP, PAD]) == text


@pytest.mark.parametrize("name", sorted(TASKS))
def test_problems_are_of_the_task(name):
    """The right answer, by reasoning-gym, has the score 1; a seed gives the same problems."""
    task = TASKS[name]
    dataset = reasoning_gym.create_dataset(name, size=1, seed=0)
    rng = np.random.default_rng(5)
    for _ in range(100):
        _, answer, entry = task.draw(rng)
        assert dataset.score_answer(task.render(answer), entry) == 1.0
    first, again = task.problems(20, seed=3), task.problems(20, seed=3)
    assert all(np.array_equal(first[k], again[k]) for k in first)


def test_a_reward_that_ignores_order_is_rejected():
    task = TASKS["number_sorting"]
    packed = jax.tree.map(
        jnp.asarray, task.pack([("<3,1,2=", "1,2,3", {}), (">3,1,2=", "3,2,1", {})])
    )
    got = task.reward(rows(task, ["1,2,3", "1,2,3"]), packed)
    assert got.tolist() == [1.0, 0.0]
