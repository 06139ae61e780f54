"""Attempts again with growing, random waits; each failure is told before its wait."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina

T = TypeVar("T")


async def attempts(
    act: Callable[[], Awaitable[T]], again: Callable[[Exception], bool | float], retries: int,
    tell: Callable[[int, Exception], Awaitable[None]],
) -> T:  # fmt: skip
    """What `act` returns, in at most `retries` attempts after the first. `again` says of an error
    whether, or after how many seconds, another is worth it."""
    try:
        return await act()  # as most do: stamina's machinery is a tenth of a turn's CPU time
    except Exception as error:
        if not retries or again(error) is False:
            raise
        failed = error
    async for attempt in stamina.retry_context(
        on=again, attempts=retries + 1, timeout=None, wait_initial=0.1, wait_jitter=0.1,
        wait_max=10.0,
    ):  # fmt: skip
        with attempt:
            try:
                if attempt.num == 1:
                    raise failed
                return await act()
            except Exception as error:
                if attempt.num <= retries and again(error) is not False:
                    await tell(attempt.num, error)
                raise
    raise AssertionError("stamina always attempts once")
