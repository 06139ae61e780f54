"""Async functions side by side, and their errors one by one instead of in groups."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

import anyio

T = TypeVar("T")


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raises what went wrong first, out of the groups that task groups wrap it in."""
    try:
        yield
    except BaseExceptionGroup as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def gather(calls: Iterable[Callable[[], Awaitable[T]]], width: float = math.inf) -> list[T]:
    """The results in the order of `calls`, `width` of which run at a time; the first that raises
    cancels the others."""
    results: dict[int, T] = {}
    limiter = anyio.CapacityLimiter(width)

    async def one(i: int, call: Callable[[], Awaitable[T]]) -> None:
        async with limiter:
            results[i] = await call()

    with unwrapped():
        async with anyio.create_task_group() as group:
            for i, call in enumerate(calls):
                group.start_soon(one, i, call)
    return [results[i] for i in sorted(results)]
