"""reasoning-gym's datasets as tasks of the runner: about a hundred, each with a verifier.

    tasks = gym_tasks("chain_sum", seeds=range(50), tools=(python_tool(),))
    jaxinfra agent eval --suite gym --names chain_sum gcd --url ...

A task is the dataset's entry for a seed, so it is the same everywhere. A try passes where the
dataset's own verifier gives the whole score for what follows the last "Answer:". Needs the package
reasoning-gym.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agent.evaluate.runner import Stage, Task
from agent.loop import Result
from agent.reason.samples import THINK
from agent.tools import Tool, as_text
from jaxinfra.errors import UserError


def gym_tasks(
    name: str, seeds: Iterable[int] = range(3), *, tools: Sequence[Tool] = (),
    config: Mapping[str, Any] | None = None,
) -> list[Task]:  # fmt: skip
    """The dataset's task for each seed; `config` are fields of the dataset's configuration, such as
    its difficulty. Raises UserError for a dataset or a field that is not there."""
    return [_task(name, seed, tuple(tools), dict(config or {})) for seed in seeds]


def _task(name: str, seed: int, tools: tuple[Tool, ...], config: dict[str, Any]) -> Task:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("reasoning-gym: pip install reasoning-gym") from None
    if name not in DATASETS:
        raise UserError(f"reasoning-gym: no dataset {name!r}; it has {len(DATASETS)}, as chain_sum")
    try:
        data = reasoning_gym.create_dataset(name, seed=seed, size=1, **config)
        entry = data[0]
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"reasoning-gym {name}: {config}: {error}") from None

    def check(result: Result) -> str | None:
        said = as_text(result.output or "").rpartition("Answer:")[2].strip()
        score = data.score_answer(said, entry)
        if result.reason == "done" and score >= 1:
            return None
        return f"{result.reason}: {said[-60:]!r} scores {score:.2f}, not {str(entry['answer'])!r}"

    return Task(name, seed, (Stage(THINK + entry["question"]),), tools, check)
