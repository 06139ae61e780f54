"""A recorded run made again, event after event in one thread: the same bits as the live one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.system.core import System
from align.system.schedule import Event
from jaxinfra.errors import UserError


class Replay:
    """Goes through the events of a schedule from where `system` stands."""

    def __init__(self, system: System, events: Sequence[Event]) -> None:
        self.system, self._events = system, list(events)[system.events :]
        self._rollouts = system.make_rollouts()
        self._learnt: Any = None

    def step(self) -> tuple[dict[str, float], Any]:
        """To the next `publish`, that included: metrics, and the experience.

        Raises UserError where the schedule ends before, or is of another run.
        """
        while self._events:
            event = self._events.pop(0)
            self._do(event)
            if event.kind == "publish":
                _, metrics, _, experience = self._learnt
                return metrics | self.system.told(), experience
        raise UserError("replay: the schedule ends here; it holds no further step")

    def _do(self, event: Event) -> None:
        system = self.system
        if event.kind == "train":
            self._learnt = system.learn(*system.take())
            return
        if event.kind == "publish":
            system.publish(self._learnt[0], self._learnt[2])
            return
        batch = system.begin() if event.kind == "begin" else system.running.get(event.batch)
        if batch is None or batch.number != event.batch:
            raise UserError(f"replay: batch {event.batch} to {event.kind}; it is another run's")
        problems = system.problems_of(batch.number)
        if event.kind == "abandon":
            system.abandon(batch, "abandoned")
        elif event.kind == "finish":
            if event.rewards is None or batch.work is None or not batch.work.done:
                raise UserError(f"replay: batch {event.batch} is not done; it is another run's")
            answers = system.answers(self._rollouts, batch.work, problems)
            system.finish(batch, answers, np.asarray(event.rewards, np.float32), {})
        else:
            if event.kind == "advance":
                system.advance(batch)
            self._rollouts.update_weights(system.published, system.version)
            if batch.work is None:
                batch.work = self._rollouts.begin(problems, int(system.state.seed), batch.number)
            else:
                batch.work = self._rollouts.advance(batch.work)
