"""Secrets leave no trace: values are replaced before an event is kept, shown or sent.

Everything that a session knows passes `Redactor.event` on its way in: the journal, the prompts, the
spans and the streamed events are made from what comes out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from agent.events import Kept, dump, load

_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bhf_[A-Za-z0-9]{30,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    re.DOTALL,
)
_SHORTEST = 8  # a shorter value would also hide what is not secret


class Redactor:
    """Replaces the given values, wherever they stand, and what has the shape of a key."""

    def __init__(self, secrets: Mapping[str, str] | None = None):
        """`secrets` maps names, which are shown, to values; by default those of the environment
        whose name ends in KEY, TOKEN, SECRET, PASSWORD or CREDENTIALS."""
        if secrets is None:
            secrets = {name: value for name, value in os.environ.items() if _NAMES.search(name)}
        known = {value: name for name, value in secrets.items() if len(value) >= _SHORTEST}
        self._names = known
        longest_first = sorted(known, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if known else None

    def text(self, text: str) -> str:
        """The text with `[redacted NAME]` for each value."""
        if self._known is not None:
            text = self._known.sub(lambda m: f"[redacted {self._names[m.group()]}]", text)
        return _SHAPES.sub("[redacted]", text)

    def event(self, event: Kept) -> Kept:
        """The event itself if nothing in it is secret, else one without; drawn token ids go too,
        as they spell the text."""
        line = dump(event)
        plain = line.replace('\\"', '"').replace("\\n", "\n")
        if "\\" not in plain and self.text(plain) == plain:
            return event  # no other escape can hide anything: most events end here
        value = json.loads(line)
        cleaned = self._walk(value)
        if cleaned == value:
            return event
        if isinstance(cleaned.get("message"), dict):
            cleaned["message"]["tokens"] = None
        return load(json.dumps(cleaned))

    def _walk(self, value: Any) -> Any:
        if isinstance(value, str):
            inner = self.text(value)
            # Arguments are JSON inside JSON: there a secret may be written with escapes.
            if inner == value and "\\" in value and value.startswith("{"):
                try:
                    parsed = json.loads(value)
                except ValueError:
                    return inner
                cleaned = self._walk(parsed)
                return inner if cleaned == parsed else json.dumps(cleaned)
            return inner
        if isinstance(value, list):
            return [self._walk(item) for item in value]
        if isinstance(value, dict):
            return {self.text(key): self._walk(inner) for key, inner in value.items()}
        return value
