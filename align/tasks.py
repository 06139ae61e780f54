"""Tasks of arithmetic on tokens: their problems, and rewards that are a part of the program.

Each is a task of reasoning-gym in a form of few tokens, one character each; the reward in the graph
is what reasoning-gym's own `score_answer` gives to the same answer, quirks included, so that a
program of jax alone can train on it. Each task has an alphabet of its own, after pad and stop.

    task = TASKS["chain_sum"]
    task.reward(rollout, task.problems(4096, seed=0))
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from align.rollout import Rollout
from jaxinfra.errors import UserError

PAD, STOP = 0, 1
Problem = tuple[str, str, Mapping[str, Any]]  # prompt, answer, what reasoning-gym's entry holds


@dataclasses.dataclass(frozen=True)
class Task:
    """An alphabet, a way to draw problems, a reward, and words for reasoning-gym."""

    name: str
    alphabet: str
    draw: Callable[[np.random.Generator], Problem]
    score: Callable[[Int[Array, "B T"], Int[Array, " B"], Mapping[str, Array]], Float[Array, " B"]]
    draw_easy: Callable[[np.random.Generator], Problem]
    """The easy setting's."""
    render: Callable[[str], str] = str
    """A tiny answer in the form that `score_answer` reads."""

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet) + 2

    def easy(self) -> Task:
        """The same task with the problems of its easy setting."""
        return dataclasses.replace(self, draw=self.draw_easy)

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(char) + 2 for char in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """Characters up to the stop token."""
        kept = list(tokens)[: list(tokens).index(STOP)] if STOP in list(tokens) else tokens
        return "".join(self.alphabet[token - 2] if token > 1 else "?" for token in kept)

    def problems(self, size: int, seed: int = 0) -> dict[str, np.ndarray]:
        """`size` problems as arrays: see `pack`."""
        rng = np.random.default_rng(seed)
        return self.pack([self.draw(rng) for _ in range(size)])

    def pack(self, problems: Sequence[Problem]) -> dict[str, np.ndarray]:
        """int32 "prompts" [M, P], "lengths" [M], "answer" [M, A], "answer_length" [M]."""
        prompts = [self.encode(prompt) for prompt, _, _ in problems]
        answers = [self.encode(answer) for _, answer, _ in problems]
        return {
            "prompts": _padded(prompts),
            "lengths": np.asarray([len(p) for p in prompts], np.int32),
            "answer": _padded(answers),
            "answer_length": np.asarray([len(a) for a in answers], np.int32),
        }

    def reward(self, rollout: Rollout, problems: Mapping[str, Array]) -> Float[Array, " B"]:
        """The score of each row's answer, in [0, 1]; `problems` have a row for each."""
        length = (jnp.sum(rollout.mask, axis=1) - rollout.stopped).astype(jnp.int32)
        return self.score(rollout.answer, length, problems)


def find(name: str) -> Task:
    """A task by its name."""
    if name not in TASKS:
        raise UserError(f"task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ZERO = 2  # the token of "0" where digits come first
_PLUS, _MINUS, _COMMA = 12, 13, 14


def _draw_chain_sum(rng: np.random.Generator, most: int = 3) -> Problem:
    """Two or three numbers of one digit, added and subtracted; the easy ones have two."""
    terms = rng.integers(0, 10, rng.integers(2, most + 1))
    signs = rng.choice(["+", "-"], len(terms) - 1)
    text = str(terms[0]) + "".join(f"{s}{t}" for s, t in zip(signs, terms[1:], strict=True))
    result = int(terms[0]) + sum(
        int(t) if s == "+" else -int(t) for s, t in zip(signs, terms[1:], strict=True)
    )
    return text + "=", str(result), {"answer": str(result)}


def _draw_spell_backward(rng: np.random.Generator, longest: int = 5) -> Problem:
    """A word of three to five letters; the easy ones have three."""
    word = "".join(rng.choice(list(LETTERS), rng.integers(3, longest + 1)))
    return word + "=", word[::-1], {"answer": word[::-1]}


def _draw_number_sorting(rng: np.random.Generator, least: int = -9) -> Problem:
    """Three integers of one digit (in the easy setting none negative), up (<) or down (>)."""
    numbers = [int(n) for n in rng.integers(least, 10, 3)]
    down = bool(rng.integers(2))
    ordered = sorted(numbers, reverse=down)
    prompt = (">" if down else "<") + ",".join(map(str, numbers)) + "="
    entry = {
        "answer": str([str(float(n)) for n in ordered]),
        "metadata": {"direction": "descending" if down else "ascending"},
    }
    return prompt, ",".join(map(str, ordered)), entry


def _score_chain_sum(
    answer: Int[Array, "B T"], length: Int[Array, " B"], problems: Mapping[str, Array]
) -> Float[Array, " B"]:
    """1 where it is the number (a sign, leading zeros allowed); else the answer's share of it."""
    value, whole = _integers(answer, _from_start(answer, length))
    wanted, known = _integers(
        problems["answer"], _from_start(problems["answer"], problems["answer_length"])
    )
    n, needle = problems["answer_length"], problems["answer"]
    right = whole & known & (value == wanted)
    share = n.astype(jnp.float32) / jnp.maximum(length, 1).astype(jnp.float32)
    return jnp.where(right, 1.0, jnp.where(_contains(answer, length, needle, n), share, 0.0))


def _score_spell_backward(
    answer: Int[Array, "B T"], length: Int[Array, " B"], problems: Mapping[str, Array]
) -> Float[Array, " B"]:
    """1 where it is the word; else the share of letters in their places, less 0.2 if all are.

    reasoning-gym adds 1/n up and takes the 0.2 only where that sum is exactly 1.
    """
    word, n = problems["answer"], problems["answer_length"]
    width = min(answer.shape[1], word.shape[1])
    place = jnp.arange(width)
    inside = (place < n[:, None]) & (place < length[:, None])
    hits = jnp.sum(inside & (answer[:, :width] == word[:, :width]), axis=1)
    exact = jnp.asarray(_SUMS_TO_ONE)[jnp.minimum(n, len(_SUMS_TO_ONE) - 1)]
    share = hits.astype(jnp.float32) / jnp.maximum(n, 1).astype(jnp.float32)
    return jnp.where(hits == n, jnp.where(length == n, 1.0, jnp.where(exact, 0.8, 1.0)), share)


_SUMS_TO_ONE = np.array([False] + [sum([1 / n] * n) == 1.0 for n in range(1, 64)])


def _score_number_sorting(
    answer: Int[Array, "B T"], length: Int[Array, " B"], problems: Mapping[str, Array]
) -> Float[Array, " B"]:
    """1 for as many integers, in order, each at most 1 from the right one; else 0."""
    fields = problems["answer"].shape[1] // 2 + 1
    got, whole, count = _fields(answer, length, fields)
    wanted, _, n = _fields(problems["answer"], problems["answer_length"], fields)
    down = problems["prompts"][:, 0] == _TOKEN_OF_DOWN
    index = jnp.arange(fields)
    used = index < n[:, None]
    step = jnp.where(down[:, None], got[:, :-1] - got[:, 1:], got[:, 1:] - got[:, :-1])
    ordered = jnp.all((step >= 0) | ~used[:, 1:], axis=1)
    near = jnp.all((jnp.abs(got - wanted) <= 1) | ~used, axis=1)
    return (whole & (count == n) & ordered & near).astype(jnp.float32)


def _from_start(tokens: Int[Array, "B T"], length: Int[Array, " B"]) -> Bool[Array, "B T"]:
    return jnp.arange(tokens.shape[1]) < length[:, None]


def _integers(
    tokens: Int[Array, "B T"], inside: Bool[Array, "B T"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """The integer that the tokens under `inside` (side by side) spell, and whether they do.

    Larger than 9 digits it is not told from others.
    """
    digit = inside & (tokens >= _ZERO) & (tokens < _ZERO + 10)
    first = inside & ~jnp.pad(inside[:, :-1], ((0, 0), (1, 0)))
    sign = first & ((tokens == _PLUS) | (tokens == _MINUS))
    after = jnp.sum(digit, axis=1, keepdims=True) - jnp.cumsum(digit, axis=1)
    power = jnp.where(digit, 10 ** jnp.minimum(after, 9), 0)
    value = jnp.sum(power * (tokens - _ZERO), axis=1)
    negative = jnp.any(sign & (tokens == _MINUS), axis=1)
    spelt = jnp.all(digit | sign | ~inside, axis=1) & jnp.any(digit, axis=1)
    return jnp.where(negative, -value, value), spelt


def _fields(
    tokens: Int[Array, "B T"], length: Int[Array, " B"], most: int
) -> tuple[Int[Array, "B F"], Bool[Array, " B"], Int[Array, " B"]]:
    """Integers between commas, whether all are integers, and how many fields there are."""
    inside = _from_start(tokens, length)
    comma = inside & (tokens == _COMMA)
    number = jnp.cumsum(comma, axis=1) - comma.astype(jnp.int32)
    values, spelt = [], []
    count = jnp.sum(comma, axis=1) + 1
    for field in range(most):
        value, whole = _integers(tokens, inside & ~comma & (number == field))
        values.append(value)
        spelt.append(whole | (field >= count))
    return jnp.stack(values, axis=1), jnp.all(jnp.stack(spelt), axis=0) & (count <= most), count


def _contains(
    text: Int[Array, "B T"], length: Array, needle: Int[Array, "B A"], n: Array
) -> Bool[Array, " B"]:
    """Whether the needle's n tokens stand anywhere in the text's `length` ones."""
    T, width = text.shape[1], needle.shape[1]
    padded = jnp.pad(text, ((0, 0), (0, width)), constant_values=-1)
    unused = jnp.arange(width) >= n[:, None]
    hits = [
        jnp.all((padded[:, s : s + width] == needle) | unused, axis=1) & (s + n <= length)
        for s in range(T)
    ]
    return jnp.any(jnp.stack(hits), axis=0)


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    width = max(len(row) for row in rows)
    return np.asarray([[*row, *[PAD] * (width - len(row))] for row in rows], np.int32)


_SORTING = DIGITS + "+-,<>="
_TOKEN_OF_DOWN = _SORTING.index(">") + 2

TASKS = {
    task.name: task
    for task in (
        Task(
            "chain_sum", DIGITS + "+-=", _draw_chain_sum, _score_chain_sum,
            functools.partial(_draw_chain_sum, most=2),
        ),
        Task(
            "spell_backward", LETTERS + "=", _draw_spell_backward, _score_spell_backward,
            functools.partial(_draw_spell_backward, longest=3),
        ),
        Task(
            "number_sorting", _SORTING, _draw_number_sorting, _score_number_sorting,
            functools.partial(_draw_number_sorting, least=0),
            lambda text: '["' + '","'.join(text.split(",")) + '"]',
        ),
    )
}  # fmt: skip
