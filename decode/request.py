"""What an engine is asked and what it answers, as plain values. This module imports no jax."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error", "timeout"]


LIKELIEST = 20  # as many tokens beside the chosen one as OpenAI's API tells
_LARGE = 1e6  # far beyond any logit, and safe in float32


class QueueFull(Exception):
    """The queue of waiting requests is at its bound; ask again later."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must match; `text` is the schema, the pattern, a JSON list or the grammar.

    A `lazy` one masks nothing where the answer may end, as in the words around tool calls, and so
    costs nothing there; a token that does not fit there is drawn again.
    """

    kind: Literal["json_schema", "regex", "choice", "lark"]
    text: str
    lazy: bool = False


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are chosen, and when it ends. Raises ValueError by field.

    temperature: 0 takes the likeliest token. top_k, top_p, min_p: 0, 1 and 0 keep every token.
    stop: strings that end the answer, and are not part of it. n: answers to one prompt.
    logprobs: that many of the likeliest tokens beside each chosen one; 0 for the chosen one alone.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    grammar: Grammar | None = None

    @cached_property
    def watched(self) -> bool:
        """Whether the host must always see a token before it can say which may come next."""
        held = self.grammar is not None and not self.lazy
        return held or bool(self.bad_words) or self.min_tokens > 0

    @cached_property
    def lazy(self) -> bool:
        """Whether the grammar is; not where penalties would count a token that is drawn again."""
        return self.grammar is not None and self.grammar.lazy and not self.penalised

    @cached_property
    def penalised(self) -> bool:
        """Whether what was said before changes what is likely now."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @cached_property
    def truncated(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @cached_property
    def plain(self) -> bool:
        """Whether temperature alone decides, and nothing but the tokens is told."""
        held = self.watched or self.grammar is not None
        changed = self.penalised or self.truncated or held or self.logit_bias
        told = self.logprobs or self.prompt_logprobs is not None
        return not (changed or told or self.allowed_tokens is not None)

    def __post_init__(self) -> None:
        finite = math.isfinite
        for name, fine, want in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", finite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top_k", 0 <= self.top_k < 1 << 31, "0 (every token) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000"),
            ("presence_penalty", abs(self.presence_penalty) <= _LARGE, "a number to a million"),
            ("frequency_penalty", abs(self.frequency_penalty) <= _LARGE, "a number to a million"),
            (
                "logit_bias",
                all(abs(x) <= _LARGE for x in self.logit_bias.values()),
                "numbers to a million",
            ),
            (
                "bad_words",
                all(word and min(word) >= 0 for word in self.bad_words),
                "no empty ones, and token ids",
            ),
            ("allowed_tokens", self.allowed_tokens is None or self.allowed_tokens, "some, or None"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
            ("stop", all(self.stop), "no empty ones"),
            ("stop_token_ids", min(self.stop_token_ids, default=0) >= 0, "token ids"),
            ("n", self.n >= 1, "1 or more"),
            ("logprobs", 0 <= (self.logprobs or 0) <= LIKELIEST, f"None, or 0 to {LIKELIEST}"),
            (
                "prompt_logprobs",
                0 <= (self.prompt_logprobs or 0) <= LIKELIEST,
                f"None, or 0 to {LIKELIEST}",
            ),
        ):
            if not fine:
                raise ValueError(f"{name}: {getattr(self, name)!r}; give {want}")


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it; of two that wait, the lower `priority` goes first.

    deadline: seconds from arrival, after which it ends as "timeout". arrival: time.monotonic().
    tenant: whose fair share it counts to. program: the agent's run that it is a call of, if any.
    cache_salt: prefixes are shared only under one salt.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    priority: int = 0
    tenant: str = ""
    program: str = ""
    cache_salt: str = ""
    deadline: float | None = None
    arrival: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: no token; give one or more")
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline: {self.deadline}; give seconds, or None")


@dataclass(frozen=True)
class Output:
    """What a step added to answer `index` of a request.

    text: certain by now; stop strings, and characters of which bytes are missing, are held back.
    logprobs: one {token: log-probability} for each of `token_ids`, which always holds that token.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[dict[int, float], ...] | None = None
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    cached_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
