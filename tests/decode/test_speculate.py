"""Drafts come from what was said before, and rest where they make an answer slower."""

import itertools

from decode.pages import Pages, Table
from decode.request import Request, SamplingParams
from decode.scheduler import Sequence
from decode.speculate import Guesses


def sequence(*tokens):
    request = Request("a", tokens[:1], SamplingParams(max_tokens=99))
    return Sequence(request, 0, 1, list(tokens), Table(Pages(9, 4)))


def test_what_followed_the_longest_run_is_drafted():
    guesses = Guesses(3)
    one = sequence(1, 2, 3, 4, 5, 9, 3, 4, 6, 7, 8, 2, 3, 4)
    assert guesses.after(one) == (5, 9, 3)  # after 2 3 4, though 3 4 came later
    one.tokens += [5, 9, 3]
    assert guesses.after(one) == (4, 6, 7)  # after 5 9 3
    assert guesses.after(sequence(1, 2, 3)) == ()


def test_drafts_stand_up_to_the_first_that_was_not_drawn():
    guesses = Guesses(3)
    drafts = (7, 8, 9)
    assert guesses.judge(drafts, [7, 8, 9, 1]) == 3
    assert guesses.judge(drafts, [7, 5, 9, 1]) == 1
    assert guesses.judge(drafts, [6, 8, 9, 1]) == 0
    assert (guesses.drafted, guesses.accepted) == (9, 4)


def drafting(plain, drafted, steps=400, owed=0.0):
    """Which steps drafted, where they make so many tokens a second and owe so many seconds."""
    guesses, made = Guesses(3), []
    for _ in range(steps):
        made.append(guesses.pay(2))
        if made[-1]:
            guesses.owe(owed)
        guesses.measured(2, made[-1], drafted if made[-1] else plain, 1.0)
    return made


def test_drafts_rest_where_they_are_slower_and_are_tried_again():
    assert sum(drafting(plain=2, drafted=3)[-200:]) > 190
    trials = [i for i, drafted in enumerate(drafting(plain=2, drafted=1, steps=3000)) if drafted]
    assert trials[:8] == [*range(8, 16)]  # after as many steps without
    rests = [b - a for a, b in itertools.pairwise(trials[7:])]
    assert rests == [65, 129, 257, 513, 1025]
    assert sum(drafting(plain=2, drafted=3, owed=1.0)[-200:]) < 10  # what must be read counts
    assert not Guesses(0).pay(1) and not Guesses(3).pay(0)
