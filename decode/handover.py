"""Prompts computed by one engine and answered by another on the same host.

A long prompt in a step makes everyone's next token late, however small its chunks. With two engines
one computes prompts (`Prefills`), the other answers (`Decodes`; DistServe, arXiv 2401.09670). What
is handed over is whole pages, as a file in memory (`folder`, in /dev/shm): they come into the
other's prefix cache, so it computes what is left of the prompt, most often less than a page, as
it does for any prompt that it knows; pages that it must give up before the request runs are
computed again. So tokens are the same; and where nothing comes, because the other engine died, the
folder is full or no page is free, it computes the prompt itself.

Cost: the pages' bytes are copied from the device, into the file, and onto the device:
2 L K H numbers a token. `decode.server.two_engines` runs both.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from decode.engine import Engine
from decode.page_moves import PageMoves
from decode.pages import OutOfPages
from decode.request import Output, Request, SamplingParams
from jaxinfra.errors import UserError

_log = logging.getLogger("jaxinfra.engine")
_PROMPT_ALONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


class _Carries(Engine):
    """An engine whose pages can go out and come in."""

    def carry(self, folder: Path) -> None:
        """Makes ready to; pages of a request lie in `folder` under its id."""
        if self.cache is None:
            raise UserError("engine: pages are handed over to a prefix cache; leave it on")
        self._folder = folder
        self._prompts: dict[str, Request] = {}
        self._moves = PageMoves(self._runner)

    def give(self, request: Request) -> None:
        """Writes the whole pages of a prompt that the cache has, if the folder has room."""
        assert self.cache is not None
        pages = self.cache.match((*request.prompt, 0), request.cache_salt)
        path = self._folder / request.id
        part = path.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                for leaf in jax.tree.leaves(self._moves.out(pages)):
                    file.write(leaf.tobytes())
            part.rename(path)  # whole, or not there
        except OSError as error:
            _log.warning(
                "%s: %s; the other engine computes the prompt. Give it more room (docker run "
                "--shm-size)", self._folder, error.strerror,
            )  # fmt: skip
            part.unlink(missing_ok=True)
        finally:
            self.pool.release(pages)

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
        held, given = self._read(data)
        whole, known = max(min(len(prompt) // size, given), len(pages)), len(pages)
        try:
            if (short := whole - known - self.pool.free) > 0:
                self.cache.evict(short, request.arrival)
            new = self.pool.take(whole - known)
            pages = [*pages, *new]
            self._moves.into(new, held, start=known)
            self.cache.insert(prompt[: whole * size], pages, request.cache_salt)
        except OutOfPages:
            pass
        finally:
            self.pool.release(pages)

    def _read(self, data: np.ndarray) -> tuple[Any, int]:
        """What `give` wrote, and of how many pages."""
        leaves, structure = jax.tree.flatten(self._runner.pool)
        each = [pages.nbytes // pages.shape[0] for pages in leaves]
        count, at, held = len(data) // sum(each), 0, []
        for pages, size in zip(leaves, each, strict=True):
            part = data[at : at + count * size].view(pages.dtype)
            held.append(part.reshape(count, *pages.shape[1:]))
            at += count * size
        return jax.tree.unflatten(structure, held), count


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
