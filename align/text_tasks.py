"""Tasks put into words, for a model that already speaks; their rewards are Python on its text.

The questions are reasoning-gym's (`chain_sum`, `products`, `spell_backward`), asked through the
model's chat template where it has one, and so is the score: 1 for the answer alone, less for the
answer among other words, 0 without it. Worked examples before the question give a small model the
form of an answer, and with it some first successes to learn from.

    task = TEXT_TASKS["chain_sum"]
    problems, answers = task.problems(512, tokenizer, seed=0, examples=3)
    reward = task.reward(answers, tokenizer)          # of a `HostLoop`
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from align.rewards import FunctionReward, Sample
from align.tasks import TASKS, Problem
from jaxinfra.errors import UserError
from jaxinfra.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextTask:
    """How problems are drawn, asked and scored."""

    name: str
    draw: Callable[[np.random.Generator], Problem]
    """A tiny task's problem: prompt, answer and what else there is."""
    ask: Callable[[str], str]
    """The question, from the tiny prompt."""
    score: Callable[[str, str], float]
    """Of what was said and the answer, in [0, 1]."""
    draw_easy: Callable[[np.random.Generator], Problem]

    def easy(self) -> TextTask:
        """The same task with the problems of its easy setting."""
        return dataclasses.replace(self, draw=self.draw_easy)

    def problems(
        self, size: int, tokenizer: Tokenizer, seed: int = 0, examples: int = 0
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """`size` problems: int32 "prompts" [M, P], padded at the right, "lengths" [M] and "number"
        [M], which is each one's place among the answers, the second result.

        Each is asked after the same `examples` problems with their answers, none of which is asked.
        """
        rng, shown = np.random.default_rng(seed), self.examples(examples)
        found = []
        while len(found) < size:
            problem = self.draw(rng)
            if problem[0] not in shown:
                found.append(problem)
        before = [(self.ask(prompt), answer) for prompt, answer in shown.items()]
        asked = functools.cache(lambda prompt: _tokens(self.ask(prompt), tokenizer, before))
        rows = [asked(prompt) for prompt, _, _ in found]
        prompts = np.zeros((size, max(map(len, rows))), np.int32)
        for place, row in zip(prompts, rows, strict=True):
            place[: len(row)] = row
        lengths, numbers = np.asarray([len(row) for row in rows]), np.arange(size)
        arrays = {"prompts": prompts, "lengths": lengths, "number": numbers}
        return {k: a.astype(np.int32) for k, a in arrays.items()}, [
            answer for _, answer, _ in found
        ]

    def examples(self, count: int) -> dict[str, str]:
        """The first `count` problems to show, always the same: tiny prompts and answers."""
        rng, shown = np.random.default_rng(_SHOWN), {}
        while len(shown) < count:
            prompt, answer, _ = self.draw(rng)
            shown[prompt] = answer
        return shown

    def reward(self, answers: Sequence[str], tokenizer: Tokenizer) -> FunctionReward:
        """Scores texts by the answers of `problems`."""

        def score(samples: Sequence[Sample]) -> list[float]:
            return [
                self.score(tokenizer.decode(s.answer), answers[int(s.problem["number"])])
                for s in samples
            ]

        return FunctionReward(score, name=self.name)


def find(name: str) -> TextTask:
    """A task by its name."""
    if name not in TEXT_TASKS:
        raise UserError(f"task {name!r} in words: choose one of {', '.join(TEXT_TASKS)}")
    return TEXT_TASKS[name]


def _tokens(question: str, tokenizer: Tokenizer, before: Sequence[tuple[str, str]]) -> list[int]:
    """A question after others with their answers: turns of a chat, or lines of a text."""
    if tokenizer.chat_template is None:
        return tokenizer.encode("".join(f"{q} {a}\n" for q, a in before) + question)
    turns = [text for pair in before for text in pair] + [question]
    return tokenizer.encode_chat(
        [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    )


def _draw_products(rng: np.random.Generator, most: int = 3) -> Problem:
    """Two or three numbers of one digit, multiplied; the easy ones have two."""
    factors = [int(n) for n in rng.integers(0, 10, rng.integers(2, most + 1))]
    answer = str(math.prod(factors))
    return "*".join(map(str, factors)) + "=", answer, {"answer": answer}


def _number(said: str, answer: str) -> float:
    """1 for the number, however written, else its share of the text, 0 where it is absent."""
    said = said.strip().replace(",", "")
    try:
        if Decimal(said) == Decimal(answer):
            return 1.0
    except InvalidOperation:
        pass
    return len(answer) / len(said) if answer in said else 0.0


def _letters(said: str, answer: str) -> float:
    """1 for the word, else the share of its letters in their places, 0.8 where more follows."""
    said, answer = said.strip().lower(), answer.lower()
    if said == answer:
        return 1.0
    right = sum(a == b for a, b in zip(said, answer, strict=False)) / len(answer)
    return 0.8 if right == 1.0 else right


def _ask_chain_sum(prompt: str) -> str:
    spaced = prompt.rstrip("=").replace("+", " + ").replace("-", " - ")
    return f"State the final answer to the following arithmetic problem: {spaced} ="


def _ask_products(prompt: str) -> str:
    spaced = prompt.rstrip("=").replace("*", " * ")
    return (
        f"Solve the following multiplication: {spaced}. Give only the result as your final answer."
    )


def _ask_spell_backward(prompt: str) -> str:
    return f"Spell this word backward (example: sun -> nus): {prompt.rstrip('=')}"


_SHOWN = 2**32  # the seed of examples

TEXT_TASKS = {
    task.name: task
    for task in (
        TextTask(
            "chain_sum", TASKS["chain_sum"].draw, _ask_chain_sum, _number,
            TASKS["chain_sum"].draw_easy,
        ),
        TextTask(
            "products", _draw_products, _ask_products, _number,
            functools.partial(_draw_products, most=2),
        ),
        TextTask(
            "spell_backward", TASKS["spell_backward"].draw, _ask_spell_backward, _letters,
            TASKS["spell_backward"].draw_easy,
        ),
    )
}  # fmt: skip
