"""Prompts computed by one engine and answered by another on the same host.

A long prompt in a step makes everyone's next token late, however small its chunks. With two engines
one computes prompts (`Prefills`), the other answers (`Decodes`; DistServe, arXiv 2401.09670). What
is handed over is whole pages, as a file in memory (`folder`, in /dev/shm): they come into the
other's prefix cache, so it computes what is left of the prompt, less than a page, as it does for
any prompt that it knows. So tokens are the same; and where nothing comes, because the other engine
died or no page is free, it computes the prompt itself.

Cost: the pages' bytes are copied from the device, into the file, and onto the device:
2 L K H numbers a token. `decode.server.two_engines` runs both.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decode.engine import Engine
from decode.pages import OutOfPages
from decode.request import Output, Request, SamplingParams
from decode.runner import ahead
from jaxinfra.errors import UserError

_AT_ONCE = 8  # pages that one call moves
_PROMPT_ALONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


class _Carries(Engine):
    """An engine whose pages can go out and come in."""

    def carry(self, folder: Path) -> None:
        """Makes ready to; pages of a request lie in `folder` under its id."""
        if self.cache is None:
            raise UserError("engine: pages are handed over to a prefix cache; leave it on")
        self._folder = folder
        self._prompts: dict[str, Request] = {}
        pool, places = self._runner.pool, np.zeros(_AT_ONCE, np.int32)
        self._out = ahead(_gather, pool, places, donate=())
        self._in = ahead(_scatter, pool, places, self._out(pool, places))

    def give(self, request: Request) -> None:
        """Writes the whole pages of a prompt that the cache has."""
        assert self.cache is not None
        pages = self.cache.match((*request.prompt, 0), request.cache_salt)
        path = self._folder / request.id
        try:
            with open(path.with_suffix(".part"), "wb") as file:
                for part in _parts(pages):
                    held = self._out(self._runner.pool, _padded(part, 0))
                    for leaf in jax.tree.leaves(held):
                        file.write(np.asarray(leaf)[: len(part)].tobytes())
        finally:
            self.pool.release(pages)
        path.with_suffix(".part").rename(path)  # whole, or not there

    def take(self, request: Request) -> None:
        """Has a prompt's pages in the cache, if they were given and there is room."""
        assert self.cache is not None
        path = self._folder / request.id
        if not path.exists():
            return
        data = np.fromfile(path, np.uint8)
        path.unlink()
        prompt, size = request.prompt, self.pool.size
        pages = self.cache.match((*prompt, 0), request.cache_salt)
        whole, known = len(prompt) // size, len(pages)
        try:
            if (short := whole - known - self.pool.free) > 0:
                self.cache.evict(short, request.arrival)
            pages = [*pages, *self.pool.take(whole - known)]
            at = 0
            for part in _parts(range(whole)):
                at = self._put(data, at, [pages[i] if i >= known else -1 for i in part])
            self.cache.insert(prompt, pages, request.cache_salt)
        except OutOfPages:
            pass
        finally:
            self.pool.release(pages)

    def _put(self, data: np.ndarray, at: int, targets: list[int]) -> int:
        """Pages from `data` into `targets`, none where that is below zero; where it ends there."""

        def leaf(pages: Any) -> np.ndarray:
            nonlocal at
            shape = (len(targets), *pages.shape[1:])
            count = int(np.prod(shape)) * pages.dtype.itemsize
            held = np.zeros((_AT_ONCE, *shape[1:]), pages.dtype)
            held[: len(targets)] = data[at : at + count].view(pages.dtype).reshape(shape)
            at += count
            return held

        pool = self._runner.pool
        moved = jax.tree.map(leaf, pool)
        self._runner.pool = self._in(pool, _padded(targets, -1), moved)
        return at


class Prefills(_Carries):
    """Computes prompts and gives their pages; says of each request only that it is done."""

    def add(self, request: Request) -> None:
        """See Engine."""
        super().add(replace(request, params=_PROMPT_ALONE))
        self._prompts[request.id] = request

    def abort(self, request_id: str) -> None:
        """See Engine."""
        super().abort(request_id)
        self._prompts.pop(request_id, None)

    def step(self) -> list[Output]:
        """See Engine."""
        ended = [output for output in super().step() if output.finish_reason is not None]
        for output in ended:
            request = self._prompts.pop(output.request_id)
            if output.finish_reason == "length":
                self.give(request)
        return ended


class Decodes(_Carries):
    """Answers, with the pages that came."""

    def add(self, request: Request) -> None:
        """See Engine."""
        self.take(request)
        super().add(request)


def _gather(pool: Any, source: Int[Array, " n"]) -> Any:
    return jax.tree.map(lambda pages: pages[source], pool)


def _scatter(pool: Any, target: Int[Array, " n"], held: Any) -> Any:
    def one(pages: Array, held: Array) -> Array:
        return pages.at[jnp.where(target < 0, pages.shape[0], target)].set(held, mode="drop")

    return jax.tree.map(one, pool, held)


def _parts(pages: Many[int]) -> list[Many[int]]:
    return [pages[i : i + _AT_ONCE] for i in range(0, len(pages), _AT_ONCE)]


def _padded(pages: Many[int], with_: int) -> np.ndarray:
    return np.asarray([*pages, *[with_] * (_AT_ONCE - len(pages))], np.int32)
