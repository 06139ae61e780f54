"""A blackboard: specialists that watch shared entries and write when they have something to add.

Nobody is told what to do; each specialist says when it can help. A round lets all who can, work on
the same board side by side; the run ends when nobody can, and says so when a round changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.gather import gather
from agent.many.patterns import Loop


@dataclass(frozen=True)
class Entry:
    """A value on the board, and who wrote it."""

    value: Any
    author: str


@dataclass
class Blackboard:
    """Entries by key, and all that was ever written, in order."""

    entries: dict[str, Entry] = field(default_factory=dict)
    history: list[tuple[str, Entry]] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        return self.entries[key].value if key in self.entries else default

    def write(self, key: str, value: Any, author: str) -> None:
        self.entries[key] = Entry(value, author)
        self.history.append((key, self.entries[key]))


@dataclass(frozen=True)
class Specialist:
    """`can` says whether it has something to add to the board; `work` returns what, by key."""

    name: str
    can: Callable[[Blackboard], bool]
    work: Callable[[Blackboard], Awaitable[Mapping[str, Any]]]


async def solve(board: Blackboard, specialists: Sequence[Specialist], rounds: int = 20) -> int:
    """Runs rounds until nobody can add anything; returns how many it took. Of two that write one
    key in a round the first in the list wins, the other may see that and try again. Raises Loop
    when a round leaves every value as it was, or after `rounds`."""
    for n in range(rounds):
        able = [one for one in specialists if one.can(board)]
        if not able:
            return n
        made = await gather(functools.partial(one.work, board) for one in able)
        written: dict[str, Entry] = {}
        for one, writes in zip(able, made, strict=True):
            for key, value in writes.items():
                written.setdefault(key, Entry(value, one.name))
        if all(board.get(key, board) == new.value for key, new in written.items()):
            raise Loop(f"blackboard: {', '.join(o.name for o in able)} changed nothing")
        for key, new in written.items():
            board.write(key, new.value, new.author)
    raise Loop(f"blackboard: not settled after {rounds} rounds")
