"""Tasks put into words, for a model that already speaks; their rewards are Python on its text.

The questions are reasoning-gym's (`chain_sum`, `spell_backward`), asked through the model's chat
template where it has one, and so is the score: 1 for the answer alone, less for the answer among
other words, 0 without it.

    task = TEXT_TASKS["chain_sum"]
    problems, answers = task.problems(512, tokenizer, seed=0)
    reward = task.reward(answers, tokenizer)          # of a `HostLoop`
"""

from __future__ import annotations

import dataclasses
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
        self, size: int, tokenizer: Tokenizer, seed: int = 0
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """`size` problems: int32 "prompts" [M, P], padded at the right, "lengths" [M] and "number"
        [M], which is each one's place among the answers, the second result.
        """
        rng = np.random.default_rng(seed)
        found = [self.draw(rng) for _ in range(size)]
        rows = [_tokens(self.ask(prompt), tokenizer) for prompt, _, _ in found]
        prompts = np.zeros((size, max(map(len, rows))), np.int32)
        for place, row in zip(prompts, rows, strict=True):
            place[: len(row)] = row
        lengths, numbers = np.asarray([len(row) for row in rows]), np.arange(size)
        arrays = {"prompts": prompts, "lengths": lengths, "number": numbers}
        return {k: a.astype(np.int32) for k, a in arrays.items()}, [
            answer for _, answer, _ in found
        ]

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


def _tokens(question: str, tokenizer: Tokenizer) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode(question)
    return tokenizer.encode_chat([{"role": "user", "content": question}])


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


def _ask_spell_backward(prompt: str) -> str:
    return f"Spell this word backward (example: sun -> nus): {prompt.rstrip('=')}"


TEXT_TASKS = {
    name: TextTask(name, TASKS[name].draw, ask, score, TASKS[name].draw_easy)
    for name, ask, score in (
        ("chain_sum", _ask_chain_sum, _number),
        ("spell_backward", _ask_spell_backward, _letters),
    )
}
