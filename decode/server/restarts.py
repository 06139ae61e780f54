"""How often what died is started again: a few times in a while, not for ever. Imports no jax."""

from __future__ import annotations

from collections import deque
from time import monotonic

MOST, WITHIN = 5, 300.0  # what dies more often than this in so many seconds is left


class Restarts:
    """Counts the deaths of one thing that is kept alive."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=MOST)

    def another(self) -> bool:
        """It died just now: whether it is worth another start."""
        now = monotonic()
        often = len(self._deaths) == MOST and now - self._deaths[0] < WITHIN
        self._deaths.append(now)
        return not often
