"""A lazy grammar holds what follows its marks, costs nothing elsewhere, and changes no draw."""

import dataclasses
import re

import pytest

from decode.answer import Answer
from decode.request import Grammar, Request, SamplingParams
from tests.decode import engines

# Words of small letters and digits; each of the digits 0 to 4 opens what must be n, three of a and
# b, and a full stop, which may not stand elsewhere.
LARK = """start: held* TEXT
held: open "n" /[ab]{3}/ "."
open[lazy]: TEXT /[0-4]/
TEXT: /[a-z0-9]*/
"""
FITS = re.compile(r"([a-z5-9]*[0-4]n[ab]{3}\.)*[a-z5-9]*([0-4](n([ab]{1,3})?)?)?")
ALLOWED = (*range(48, 58), *range(97, 123), 46)
PARAMS = SamplingParams(
    max_tokens=60, temperature=1.5, logprobs=0, ignore_eos=True, allowed_tokens=ALLOWED,
    grammar=Grammar("lark", LARK, lazy=True),
)  # fmt: skip


def answers(params=PARAMS, **changes):
    """Texts, tokens and log-probabilities of twelve answers, which do not fit in side by side."""
    engine = engines.engine(**changes)
    prompts = engines.prompts(12)
    asked = [Request(str(i), p[:35], dataclasses.replace(params, seed=i))
             for i, p in enumerate(prompts)]  # fmt: skip
    made = {}
    for (id, _), outputs in engines.run(engine, asked).items():
        logps = [p for o in outputs for one in o.logprobs or () for p in one.values()]
        made[id] = "".join(o.text for o in outputs), engines.tokens(outputs), logps
    return made, engine


@pytest.mark.parametrize("changes", [{"steps": 3, "draft": 0}, {"steps": 1, "draft": 4}, {}])
def test_what_follows_a_mark_is_held_however_tokens_come(changes):
    made, engine = answers(**changes)
    alone, _ = answers(steps=1, draft=0, prefix_cache=False)
    assert engine.scheduler.preempted > 0
    held = 0
    for id, (text, tokens, logps) in made.items():
        assert FITS.fullmatch(text), text
        assert len(tokens) == len(logps) == 60 and (text, tokens) == alone[id][:2]
        assert logps == pytest.approx(alone[id][2], abs=1e-4)
        held += text.count(".")
    assert held > 30
    engine.pool.check()


def test_penalties_make_it_hold_throughout():
    made, _ = answers(dataclasses.replace(PARAMS, frequency_penalty=0.5))
    assert all(FITS.fullmatch(text) for text, *_ in made.values())


def test_an_engine_that_does_not_watch_is_caught(monkeypatch):
    monkeypatch.setattr(Answer, "watched", property(lambda self: False))
    made, _ = answers(steps=3, draft=0)
    assert not all(len(tokens) == 60 for _, tokens, _ in made.values())  # an error ended them


def test_it_masks_nothing_before_a_mark(monkeypatch):
    """Letters alone: no mask is ever made, so that nothing is paid."""
    masks = []
    fill = Answer.fill
    monkeypatch.setattr(Answer, "fill", lambda *a: (masks.append(1), fill(*a)))
    letters = dataclasses.replace(PARAMS, allowed_tokens=ALLOWED[10:-1])
    free = dataclasses.replace(letters, grammar=None)
    held, same = (
        {id: (text, tokens) for id, (text, tokens, _) in answers(params)[0].items()}
        for params in (letters, free)
    )
    assert held == same and not masks
    answers()
    assert masks
