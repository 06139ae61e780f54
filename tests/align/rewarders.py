"""Rewards for tests, of a module that imports nothing heavy: other processes import it."""

import os
import time


def correct(sample):
    """1 where the answer is the problem's, token by token."""
    wanted = tuple(int(t) for t in sample.problem["answer"][: int(sample.problem["answer_length"])])
    return float(tuple(sample.answer) == wanted)


def length(sample):
    return float(len(sample.answer))


def moody(sample):
    """Hangs, dies or raises by the length of the answer."""
    kind = len(sample.answer)
    if kind == 0:
        time.sleep(60)
    if kind == 1:
        os._exit(3)
    if kind == 2:
        raise RuntimeError("no")
    return float(kind)
