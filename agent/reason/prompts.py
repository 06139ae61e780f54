"""Prompts as data: templates with versions, examples chosen for a task, a search for better ones.

    prompt = Template("triage", 3, "Sort this ticket into {labels}.\n{examples}\nTicket: {ticket}")
    prompt.render(labels="bug, wish", examples=few_shot(pool, ticket, 3), ticket=ticket)

The optimiser is a small one in the manner of Zhou et al. (2022, arXiv:2211.01910) and Pryzant et
al. (2023, arXiv:2305.03495): it shows a model the failures, asks for a better prompt, keeps what
scores better on the training half, and reports the held-out half, which no choice was made on.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from agent.memory.embed import Embedder, Ngrams
from agent.reason.branch import Branch, Exhausted
from jaxinfra.errors import UserError


@dataclass(frozen=True)
class Template:
    """A prompt with `{names}` to be filled. `id` goes into traces: it changes with the text."""

    name: str
    version: int
    text: str

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(name for _, name, _, _ in string.Formatter().parse(self.text) if name)

    @property
    def id(self) -> str:
        """Name, version and a hash of the text."""
        return f"{self.name}@{self.version}#{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    def render(self, **values: object) -> str:
        """The prompt; raises UserError where a name is missing or unknown. Values are put in as
        they are: braces in them mean nothing."""
        if self.fields != values.keys():
            wrong = sorted(self.fields ^ values.keys())
            raise UserError(f"prompt {self.name}: {wrong[0]!r} is missing or unknown")
        return self.text.format_map({name: str(value) for name, value in values.items()})


@dataclass(frozen=True)
class Example:
    """A question with its right answer."""

    question: str
    answer: str


def few_shot(pool: Sequence[Example], question: str, k: int, embed: Embedder | None = None) -> str:
    """The `k` examples nearest to the question, the nearest last, never the question itself."""
    others = [one for one in pool if one.question != question]
    if not others or k < 1:
        return ""
    embed = embed or Ngrams()
    near = embed([one.question for one in others]) @ embed([question])[0]
    chosen = sorted(range(len(others)), key=lambda i: (-near[i], i))[:k]
    return "\n\n".join(f"Q: {others[i].question}\nA: {others[i].answer}" for i in reversed(chosen))


Score = Callable[[Template, Example], Awaitable[float]]
_ASK = """This prompt is used for the questions below, with {{question}} filled in:
---
{prompt}
---
It failed on:
{failures}
Write a better prompt. It must contain {{question}} once. Write the prompt alone."""


@dataclass(frozen=True)
class Optimised:
    """The best template; scores on the training half as it went, and before and after on the
    held-out half."""

    template: Template
    training: list[float]
    held_out: tuple[float, float]


async def optimise(
    template: Template, examples: Sequence[Example], score: Score, writer: Branch,
    *, rounds: int = 3, candidates: int = 2,
) -> Optimised:  # fmt: skip
    """A better `template` for questions such as `examples`; `score` is 0 to 1 for one example,
    `writer` proposes. The template's one field must be `question`."""
    if template.fields != {"question"} or len(examples) < 4:
        raise UserError("optimise: give a template with the field question, and 4 examples or more")
    train, held = examples[0::2], examples[1::2]

    async def mean(one: Template, over: Sequence[Example]) -> tuple[float, list[Example]]:
        scores = [await score(one, example) for example in over]
        failed = [e for e, s in zip(over, scores, strict=True) if s < 1]
        return sum(scores) / len(scores), failed

    best, (score_now, failures) = template, await mean(template, train)
    history = [score_now]
    for _ in range(rounds):
        if not failures:
            break
        shown = "\n".join(f"Q: {e.question}\nright answer: {e.answer}" for e in failures[:4])
        for seed in range(candidates):
            asked = _ASK.format(prompt=best.text, failures=shown)
            settings = replace(writer.settings, temperature=1.0, seed=seed)
            try:
                written = await writer.aside(asked, settings)
            except Exhausted:
                break
            candidate = _usable(template, best.version + 1, written)
            if candidate is not None:
                scored, failed = await mean(candidate, train)
                if scored > score_now:
                    best, score_now, failures = candidate, scored, failed
        history.append(score_now)
    before, after = (await mean(template, held))[0], (await mean(best, held))[0]
    return Optimised(best, history, (before, after))


def _usable(template: Template, version: int, written: str) -> Template | None:
    candidate = replace(template, version=version, text=written.strip().strip("`").strip())
    try:
        return candidate if candidate.fields == {"question"} else None
    except ValueError:  # unbalanced braces
        return None
