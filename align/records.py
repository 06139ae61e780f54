"""What a policy said, token by token, with the numbers that it learnt from: one line an answer.

`RUN/rollouts.jsonl` has, for the first groups of a step, each answer's tokens and for each of them

    sampler, old, new, ref   log-probabilities: of who drew it, before the update, after it, of the
                             reference (nats; old is the sampler's where there was one update)
    ratio                    exp(new - old)
    advantage, mask, entropy, value

`jaxinfra rollouts RUN` shows them. Cost: a forward pass of the recorded answers, and their text.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align.config import RLConfig
from align.experience import Experience
from align.logprobs import answer_logps
from align.rollout import Rollout
from align.step import RLState
from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params

_log = logging.getLogger(__name__)
FILE = "rollouts.jsonl"
DIGITS = 6  # of each number, after the point


class Recorder:
    """Writes the answers of `groups` groups, every `every` steps, to FOLDER/rollouts.jsonl.

    Args:
      decode: tokens to text; without it the tokens' numbers are shown.
      step: of a resume: lines of later steps are removed.

    Where the disk is full, a warning says so once, and `lost` counts the steps without records.
    """

    def __init__(
        self, folder: Path, config: RLConfig, model: ModelConfig, *, groups: int = 2,
        every: int = 1, decode: Callable[[Sequence[int]], str] | None = None, step: int = 0,
        dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        if groups < 1 or every < 1:
            raise UserError(f"records: groups={groups}, every={every}: give 1 or more")
        self._rows, self._every = groups * config.group_size, every
        self._group_size, self._decode, self.lost = config.group_size, decode, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / FILE
        if self._file.is_file():
            kept = [row for row in read(self._file) if row["step"] <= step]
            self._file.write_text("".join(json.dumps(row) + "\n" for row in kept))

        def measured(params: Params, r: Rollout) -> tuple[Any, Any]:
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
            T = r.answer.shape[1]
            return answer_logps(params, model, r.tokens, r.lengths, T, config.sampling)

        self._measured = jax.jit(measured)

    def write(self, state: RLState, experience: Experience | None) -> None:
        """The records of the step that ended in `state`."""
        step = int(state.step)
        if experience is None or (step - 1) % self._every:
            return
        alone: Any = experience
        e = jax.tree.map(lambda a: a[: self._rows], alone.replace(kl=None))
        new, entropy = self._measured(state.trained.policy, e.rollout)
        lines = [json.dumps(row) + "\n" for row in self._answers(step, e, new, entropy)]
        try:
            with open(self._file, "a") as file:
                file.writelines(lines)
        except OSError as error:
            if not self.lost:
                _log.warning("%s: cannot be written (%s); the run goes on", self._file, error)
            self.lost += 1

    def _answers(self, step: int, e: Any, new: Any, entropy: Any) -> Iterator[dict[str, Any]]:
        e, new, entropy = jax.device_get((e, new, entropy))
        r = e.rollout
        old = r.logps if e.old_logps is None else e.old_logps
        numbers = {
            "sampler": r.logps, "old": old, "new": new, "ratio": np.exp(new - old),
            "advantage": e.advantages, "mask": e.mask, "entropy": entropy,
        }  # fmt: skip
        more = {"ref": e.ref_logps, "value": e.values, "weight": e.weights}
        numbers |= {name: values for name, values in more.items() if values is not None}
        for i in range(len(r.lengths)):
            n, prompt = int(r.mask[i].sum()), r.tokens[i, : r.lengths[i]].tolist()
            answer = r.answer[i, :n].tolist()
            row = {
                "step": step, "group": i // self._group_size, "answer": i % self._group_size,
                "reward": _finite(e.rewards[i]), "stopped": bool(r.stopped[i]),
                "prompt": self._text(prompt), "tokens": answer,
                "texts": [self._text([token]) for token in answer],
            }  # fmt: skip
            yield row | {k: [_finite(x) for x in v[i, :n]] for k, v in numbers.items()}

    def _text(self, tokens: Sequence[int]) -> str:
        return self._decode(tokens) if self._decode else " ".join(map(str, tokens))


def read(file: str | Path) -> list[dict[str, Any]]:
    """The answers of a file; a last line that was cut off is left out.

    Raises UserError where there is none.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no records; run with --records.every 1, or name another run")
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _finite(value: Any) -> float | None:
    value = float(value)
    return round(value, DIGITS) if math.isfinite(value) else None
