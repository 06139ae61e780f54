"""Thinking before answering, and several such thoughts that vote.

Chain of thought: Wei et al., 2022, arXiv:2201.11903. Self-consistency: Wang et al., 2022,
arXiv:2203.11171; here it stops as soon as no later sample could change the winner.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent.reason.branch import Branch, Exhausted

THINK = "Think step by step. End with one line: Answer: and the answer alone.\n\n"
_ANSWER = re.compile(r"^\W*answer\W*:[ \t]*(.+?)[ \t.]*$", re.MULTILINE | re.IGNORECASE)


def answer_of(text: str) -> str | None:
    """The last line "Answer: ..." of a text, without what surrounds it."""
    found = _ANSWER.findall(text)
    return found[-1].strip("*`$ ") if found else None


async def chain_of_thought(branch: Branch, question: str) -> str | None:
    """The answer after thinking aloud; None where none is given."""
    return answer_of(await branch.ask(THINK + question))


@dataclass(frozen=True)
class Vote:
    """The winner (None without any answer), how many said what, and how many were asked."""

    answer: str | None
    counts: Counter[str]
    asked: int


async def self_consistency(
    branch: Branch, question: str, samples: int = 5, temperature: float = 0.7,
    same: Callable[[str], str] = str.lower,
) -> Vote:  # fmt: skip
    """The most frequent answer of up to `samples` chains of thought, drawn from forks of `branch`
    with seeds 0, 1, ...; `same` maps answers that mean the same to one. A tie goes to the first."""
    counts: Counter[str] = Counter()
    written: dict[str, str] = {}
    asked = 0
    for i in range(samples):
        ranked = [n for _, n in counts.most_common(2)] + [0, 0]
        if ranked[0] > ranked[1] + samples - asked:
            break
        settings = replace(branch.settings, temperature=temperature, seed=i)
        try:
            answer = answer_of(await branch.aside(THINK + question, settings))
        except Exhausted:
            break
        asked += 1
        if answer is not None:
            counts[same(answer)] += 1
            written.setdefault(same(answer), answer)
    winner = counts.most_common(1)[0][0] if counts else None
    return Vote(written[winner] if winner is not None else None, counts, asked)
