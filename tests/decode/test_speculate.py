"""Drafts come from what was said before, and rest where they make an answer slower."""

from decode.pages import Pages, Table
from decode.request import Request, SamplingParams
from decode.scheduler import Chunk, Sequence
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
    chunk = Chunk(sequence(1, 2), 1, 1, 4, (7, 8, 9))
    assert guesses.judge(chunk, [7, 8, 9, 1]) == 3
    assert guesses.judge(chunk, [7, 5, 9, 1]) == 1
    assert guesses.judge(chunk, [6, 8, 9, 1]) == 0
    assert (guesses.drafted, guesses.accepted) == (9, 4)


def drafting(plain, drafted, steps=400):
    """The share of the last steps that drafted, where steps make so many tokens a second."""
    guesses, made = Guesses(3), []
    for _ in range(steps):
        made.append(guesses.pay(2))
        guesses.measured(2, made[-1], drafted if made[-1] else plain, 1.0)
    return sum(made[-200:]) / 200


def test_drafts_rest_where_they_are_slower_and_are_tried_again():
    assert drafting(plain=2, drafted=3) > 0.95
    assert 0 < drafting(plain=2, drafted=1) < 0.05
    assert not Guesses(0).pay(1) and not Guesses(3).pay(0)
