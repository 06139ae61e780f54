"""SIGKILL anywhere, resume, and each effect has happened once."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 2 * 33 + 2 * 10  # before and after each append, before and after each effect


def trials(folder: Path, plan: list, **env: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.agent.crash_worker", str(folder), json.dumps(plan)],
        capture_output=True, text=True, timeout=600, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(told: list[dict], plan: list) -> None:
    whole = told[0]
    assert whole["killed"] == 0 and whole["effects"] == 10 and whole["finished"] == "all done"
    for trial, (deaths, effects, _) in zip(told[1:], plan[1:], strict=True):
        where = f"{effects} killed at {deaths}"
        assert trial["finished"] == "all done", where
        assert trial["finishes"] == 10, where
        if effects == "idempotent":
            assert trial["effects"] == 10 and trial["in_doubt"] == 0, where
            assert trial["messages"] == whole["messages"], where
        else:  # nothing can know whether a call in doubt had its effect; it is never made again
            assert trial["in_doubt"] <= len(deaths), where
            assert 10 - trial["in_doubt"] <= trial["effects"] <= 10, where


def some(count: int, seed: int) -> list:
    """Deaths at steps, at times, and twice; of tools with keys and of tools that write."""
    draw = random.Random(seed)
    plan: list = [[[], "idempotent", True]]
    for i in range(count):
        one = draw.randint(1, STEPS) if i % 3 else draw.uniform(0.0, 0.06)
        deaths = [one, draw.randint(1, STEPS)] if i % 4 == 0 else [one]
        plan.append([deaths, "write" if i % 5 == 0 else "idempotent", True])
    return plan


def test_kills_at_random_points(tmp_path):
    plan = some(30, seed=0)
    told = trials(tmp_path, plan)
    check(told, plan)
    assert sum(trial["killed"] for trial in told) >= 20  # those told a step, not a time


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    plan = some(200, seed=1)
    told = trials(tmp_path, plan)
    check(told, plan)
    assert sum(trial["killed"] for trial in told) >= 133


def test_a_service_without_keys_is_caught(tmp_path):
    """The known-wrong tool: it claims to be idempotent and forgets its keys."""
    plan = [[[], "idempotent", False], *([[at], "idempotent", False] for at in range(10, 19))]
    told = trials(tmp_path, plan)
    with pytest.raises(AssertionError, match="idempotent killed at"):
        check(told, plan)


def test_calls_in_doubt_are_not_repeated_but_told(tmp_path):
    plan = [[[], "write", True], *([[at], "write", True] for at in range(10, 19))]
    told = trials(tmp_path, plan)
    check(told, plan)
    doubted = [trial for trial in told if trial["in_doubt"]]
    assert doubted
    assert all("may or may not have taken effect" in str(trial["messages"]) for trial in doubted)
