"""A vote that some of the members may spoil.

The collector is trusted, the members are not: up to f of n may crash, hang, or lie, also in
concert. An answer counts when f + 1 members give it, as one of them then is honest; where honest
members agree, n >= 2 f + 1 always reaches it (Lamport, Shostak and Pease, 1982, with a trusted
collector). The slowest members are not waited for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio

from jaxinfra.errors import UserError


class NoQuorum(Exception):
    """No answer was given often enough; `counts` says what was."""

    def __init__(self, counts: Counter[str], failed: dict[int, str]):
        super().__init__(f"no quorum: {dict(counts)}, failed: {failed}")
        self.counts, self.failed = counts, failed


@dataclass(frozen=True)
class Agreed:
    """The answer, how many gave each before it was decided, and whose members failed and how."""

    answer: str
    counts: Counter[str]
    failed: dict[int, str]


async def quorum(
    members: Sequence[Callable[[], Awaitable[str]]], *, faulty: int, seconds: float | None = None,
    same: Callable[[str], str] = str.strip,
) -> Agreed:  # fmt: skip
    """The first answer that `faulty` + 1 members give. Raises NoQuorum, and UserError where so many
    faulty members could decide or prevent a vote."""
    if faulty < 0 or len(members) < 2 * faulty + 1:
        raise UserError(
            f"quorum: {len(members)} members bear {max(0, (len(members) - 1) // 2)} faulty ones, "
            f"not {faulty}; ask {2 * faulty + 1} or more"
        )
    counts: Counter[str] = Counter()
    failed: dict[int, str] = {}
    winner: list[str] = []

    async def ask(i: int, scope: anyio.CancelScope) -> None:
        try:
            answer = await members[i]()
        except Exception as error:
            failed[i] = f"{type(error).__name__}: {error}"
            return
        if winner:
            return
        counts[same(answer)] += 1
        if counts[same(answer)] == faulty + 1:
            winner.append(answer)
            scope.cancel()

    with anyio.move_on_after(seconds):
        async with anyio.create_task_group() as group:
            for i in range(len(members)):
                group.start_soon(ask, i, group.cancel_scope)
    if not winner:
        raise NoQuorum(counts, failed)
    return Agreed(winner[0], counts, failed)
