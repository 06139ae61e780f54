"""The system's state and its six events; who calls them when is `live` and `replay`.

One class holds all that the parts share: the trainer's state, the weights published last, batches
under way, the buffer, the schedule. Its methods are short and change that and nothing else; the
long work (drawing, scoring, learning) lies between them and touches only its own arrays. A caller
with threads holds `lock` while it calls a method.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from align.buffer import Buffer, Item
from align.host_loop import HostLoop, JitRollouts, Rollouts, Work, answers_of
from align.rewards import Answers
from align.rollout import Rollout
from align.step import Problems, RLState
from align.system.config import SystemConfig
from align.system.schedule import Event, Schedule, finished
from jaxinfra.errors import UserError
from jaxinfra.model.params import Params

_ROLLOUT = [field.name for field in dataclasses.fields(Rollout)]


@dataclasses.dataclass
class Running:
    """A batch under way: which policies drew it so far, and since when."""

    number: int
    spans: list[tuple[int, int]]
    """(number of calls, version) of each policy that drew a part, oldest first."""
    since: float
    work: Work | None = None
    """Where the caller keeps it here, so that it goes into a checkpoint."""


class System:
    """One run: `loop` draws, scores and learns; this says who does what with which weights.

    Args:
      folder: for the schedule, and for experience that memory is too small for.
      make_rollouts: one for each worker; by default copies of the loop's, with the same programs.
      saved: what `saved` of a system gave that was at `state`; work under way goes on where it is
        in there, and else is abandoned.
    """

    def __init__(
        self, loop: HostLoop, how: SystemConfig, state: RLState, *, folder: Path | None = None,
        make_rollouts: Callable[[], Rollouts] | None = None,
        saved: Mapping[str, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        how.check(loop.config)
        self.loop, self.how, self.state = loop, how, state
        self.make_rollouts = make_rollouts or self._copies
        self.lock = threading.RLock()
        self.published: Params = state.trained.policy
        self.version = self.numbers = int(state.step)
        self.running: dict[int, Running] = {}
        self.returned: list[int] = []
        self.counts: Counter[str] = Counter()
        self.scored: dict[str, float] = {}  # of the batch that was scored last
        spilled: Any = {"memory": how.memory, "folder": folder / "experience"} if folder else {}
        self.buffer = Buffer(
            how.capacity, how.order, max_age=how.max_staleness, seed=int(state.seed), **spilled
        )
        about = json.loads(saved["about"].tobytes()) if saved else {"events": 0}
        self.schedule = Schedule(folder / "schedule.jsonl" if folder else None, about["events"])
        self.events = about["events"]
        if saved:
            self._restore(saved, about)

    def _copies(self) -> Rollouts:
        one = self.loop.rollouts
        if self.how.chunk and not (isinstance(one, JitRollouts) and one.chunk == self.how.chunk):
            raise UserError(
                f"system: chunk={self.how.chunk}: give the loop JitRollouts with that chunk"
            )
        return copy.copy(one)

    # What the parts share changes here and nowhere else.

    def may_begin(self) -> bool:
        """Whether one more batch would be learnt from before it is too old.

        Batches begun, less groups lost to age, are ahead of the version by max_staleness + 1.
        """
        P = self.loop.config.prompts
        ahead = (self.numbers - len(self.returned) - self.version) * P
        if self.how.order == "fifo":  # elsewhere an item that goes has been learnt from
            ahead -= self.buffer.counts["too_old"] + self.buffer.counts["evicted"]
        return ahead < (self.how.max_staleness + 1) * P

    def begin(self) -> Running:
        """A batch to draw: the first that was given back, or the next."""
        if self.returned:
            number = self.returned.pop(0)
        else:
            number, self.numbers = self.numbers, self.numbers + 1
        self._add(Event("begin", number))
        self.running[number] = Running(number, [(1, self.version)], time.monotonic())
        return self.running[number]

    def advance(self, batch: Running) -> None:
        """The batch's next tokens are drawn with the weights published last."""
        self._add(Event("advance", batch.number))
        calls, version = batch.spans[-1]
        if version == self.version:
            batch.spans[-1] = (calls + 1, version)
        else:
            batch.spans.append((1, self.version))

    def current(self, batch: Running) -> bool:
        """Whether the batch has not been given to another worker meanwhile."""
        return self.running.get(batch.number) is batch

    def finish(
        self, batch: Running, answers: Answers, rewards: np.ndarray, told: dict[str, float]
    ) -> None:
        """The groups of a batch, with rewards [B, R], go into the buffer; `told` are metrics."""
        self.scored = told
        self._add(finished(batch.number, rewards))
        del self.running[batch.number]
        G, r = self.loop.config.group_size, answers.rollout
        for first in range(0, answers.size, G):
            rows = slice(first, first + G)
            arrays = {name: np.asarray(getattr(r, name))[rows] for name in _ROLLOUT}
            arrays["rewards"] = rewards[rows]
            tokens = int(np.sum(r.lengths[rows]) + np.sum(r.mask[rows]))
            self.buffer.add(arrays, tokens=tokens, version=batch.spans[0][1])

    def abandon(self, batch: Running, why: str) -> None:
        """The batch is lost; its prompts are drawn again."""
        self._add(Event("abandon", batch.number))
        del self.running[batch.number]
        self.returned.append(batch.number)
        self.counts[why] += 1

    def ready(self) -> bool:
        """Whether there is a batch to learn from."""
        return self.buffer.ready(self.loop.config.prompts, self.version)

    def take(self) -> tuple[list[Item], np.ndarray]:
        """Groups to learn from, and their weights."""
        self._add(Event("train"))
        return self.buffer.draw(self.loop.config.prompts, self.version)

    def publish(self, state: RLState, priorities: dict[int, float]) -> None:
        """The trainer's new state; its weights are those of all that follows."""
        self._add(Event("publish"))
        for number, priority in priorities.items():
            self.buffer.reprioritise(number, priority)
        self.state, self.published = state, state.trained.policy
        self.version = int(state.step)

    # The long work between two changes.

    def problems_of(self, number: int) -> Problems:
        """The prompts of a batch."""
        state: Any = self.state
        return self.loop.batch(state.replace(step=jnp.int32(number)))

    def answers(self, rollouts: Rollouts, work: Work, problems: Problems) -> Answers:
        """Drawn answers, on the host."""
        return answers_of(rollouts.finish(work), problems, self.loop.config.group_size)

    def learn(
        self, items: list[Item], weights: np.ndarray
    ) -> tuple[RLState, dict[str, float], dict[int, float], Any]:
        """The update of a batch: the new state, metrics, new priorities, the experience."""
        arrays = [item.arrays or {} for item in items]
        r = Rollout(**{k: jnp.asarray(np.concatenate([a[k] for a in arrays])) for k in _ROLLOUT})
        rewards = np.concatenate([a["rewards"] for a in arrays])
        G = self.loop.config.group_size
        each = np.repeat(weights, G) if self.how.order == "prioritised" else None
        state, metrics, experience = self.loop.learn(self.state, r, rewards, each)
        ages = [self.version - item.version for item in items]
        metrics |= {"staleness/mean": float(np.mean(ages)), "staleness/max": float(max(ages))}
        priorities: dict[int, float] = {}
        if self.how.order == "prioritised" and experience is not None:
            size = np.abs(np.asarray(experience.advantages)).mean(axis=1).reshape(-1, G).mean(1)
            priorities = {i.number: float(s) + 1e-3 for i, s in zip(items, size, strict=True)}
        return state, metrics, priorities, experience

    def told(self) -> dict[str, float]:
        """Metrics of what the parts share."""
        counts = self.counts + self.buffer.counts
        return self.scored | {
            "buffer/groups": float(len(self.buffer)), "buffer/tokens": float(self.buffer.tokens),
            **{f"system/{name}": float(n) for name, n in sorted(counts.items())},
        }  # fmt: skip

    # What of it goes into a checkpoint beside the trainer's state.

    def saved(self) -> dict[str, np.ndarray]:
        """Arrays from which `restore` makes the same system, work under way included where it is
        kept here."""
        about = {
            "numbers": self.numbers, "returned": self.returned, "counts": dict(self.counts),
            "events": self.events,
            "running": [[b.number, b.spans, b.work is not None] for b in self.running.values()],
        }  # fmt: skip
        arrays = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "buffer": np.frombuffer(self.buffer.state(), np.uint8),
        }
        for batch in self.running.values():
            if batch.work is not None:
                leaves = jax.tree.leaves(jax.device_get(batch.work.carry))
                arrays |= {f"work/{batch.number}/{i}": leaf for i, leaf in enumerate(leaves)}
        return arrays

    def _restore(self, saved: Mapping[str, np.ndarray], about: Any) -> None:
        self.numbers, self.returned = about["numbers"], about["returned"]
        self.counts = Counter(about["counts"])
        self.buffer.restored(saved["buffer"].tobytes())
        for number, spans, kept in about["running"]:
            batch = Running(number, [(a, b) for a, b in spans], time.monotonic())
            self.running[number] = batch
            if kept:
                batch.work = self._work(number, saved)
            else:
                self.abandon(batch, "interrupted")

    def _work(self, number: int, saved: Mapping[str, np.ndarray]) -> Work:
        rollouts = self.make_rollouts()
        assert isinstance(rollouts, JitRollouts), "only their work is kept"
        rollouts.update_weights(self.published, self.version)
        seed = int(self.state.seed)
        like = rollouts.like(self.problems_of(number), seed, number)
        leaves, form = jax.tree.flatten(like)
        names = (f"work/{number}/{i}" for i in range(len(leaves)))
        carry = jax.tree.unflatten(form, [jnp.asarray(saved[name]) for name in names])
        return rollouts.work(seed, number, carry)

    def _add(self, event: Event) -> None:
        self.schedule.add(event)
        self.events += 1
