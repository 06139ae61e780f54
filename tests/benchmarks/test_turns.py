"""Contestants answer in turn from processes of their own."""

import os

import pytest

from benchmarks.turns import Contestant

MODULE = """
import os, sys
from benchmarks.turns import answer

count = 0
def turn():
    global count
    count += 1
    if count == 3:
        raise SystemExit(7)
    print("noise")
    return {"turn": count, "name": sys.argv[-1], "pid": os.getpid()}
answer(turn)
"""


def test_turns_keep_their_process_and_a_dead_one_is_told(tmp_path):
    (tmp_path / "walker.py").write_text(MODULE.replace('print("loading")\n', ""))
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    contestants = [Contestant("walker", name, PYTHONPATH=path) for name in ("a", "b")]
    first = [contestant.turn() for contestant in contestants]
    again = [contestant.turn() for contestant in contestants]
    assert [(t["turn"], t["name"]) for t in first + again] == [
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (2, "b"),
    ]
    assert [t["pid"] for t in first] == [t["pid"] for t in again]
    assert len({os.getpid(), *(t["pid"] for t in first)}) == 3
    contestants[1].close()
    with pytest.raises(RuntimeError, match=r"walker.*ended with 7"):
        contestants[0].turn()
