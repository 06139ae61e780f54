"""An answer's text as its tokens come, without what a stop string or a later token may change.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfra.text import Tokenizer


class Text:
    """The text of one answer; `push` and `finish` return what is certain and was not before."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=1)
        self._held = ""

    def push(self, token: int, early: bool = False) -> tuple[str, str | None]:
        """(text, the stop string that ended it); `early`: none may end it yet."""
        return self._take(self._stream.push(token), early)

    def finish(self) -> tuple[str, str | None]:
        """(the rest of the text, the stop string in it)."""
        text, found = self._take(self._stream.finish(), False)
        return (text, found) if found else (text + self._held, None)

    def _take(self, new: str, early: bool) -> tuple[str, str | None]:
        self._held += new
        if not self._stop or not new:
            text, self._held = (self._held, "") if not self._stop else ("", self._held)
            return text, None
        # What stood here before held no stop string: one may begin in the last characters of it.
        stops = () if early else self._stop
        found = [(at, stop) for stop in stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda one: (one[0], -len(one[1])))
            text, self._held = self._held[:at], ""
            return text, stop
        keep = self._may_begin()
        text, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return text, None

    def _may_begin(self) -> int:
        """Characters at the end with which a stop string may begin."""
        for count in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stop):
                return count
        return 0
