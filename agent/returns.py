"""When a session's next turn will come, by how long its tools took before."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

_WEIGHT = 0.3  # of what was seen last
_FIRST = 1.0  # seconds, of a tool that was never seen to return


class Returns:
    """Learns the usual time of each tool: a moving mean of its logarithm, as times have long tails.

    Of several tools of one turn the one that takes longest decides. Cost: O(1) a turn.
    """

    def __init__(self) -> None:
        self._usual: dict[str, float] = {}  # logarithm of seconds, by tool
        self._away: dict[str, tuple[float, str]] = {}  # by session: since when, for which tool

    def leaves(self, session: str, tools: Iterable[str]) -> float:
        """A turn ended in calls of `tools`; returns the seconds until the next is expected."""
        usual, tool = max((self._usual.get(tool, math.log(_FIRST)), tool) for tool in tools)
        self._away[session] = time.monotonic(), tool
        return math.exp(usual)

    def comes(self, session: str) -> None:
        since, tool = self._away.pop(session, (0.0, None))
        if tool is not None:
            took = math.log(max(time.monotonic() - since, 1e-3))
            usual = self._usual.get(tool, took)
            self._usual[tool] = usual + _WEIGHT * (took - usual)

    def forget(self, session: str) -> None:
        self._away.pop(session, None)
