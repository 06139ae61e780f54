"""One answer as it grows: its text, its log-probabilities, its grammar, and when it ends.

Imports no jax.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from decode.grammar import Matcher
from decode.request import FinishReason, Output
from decode.scheduler import Chunk, Sequence
from decode.text import Text
from jaxinfra.text import Tokenizer


class Answer:
    """What is told of one sequence."""

    def __init__(
        self, sequence: Sequence, tokenizer: Tokenizer | None, eos: frozenset[int],
        matcher: Matcher | None,
    ) -> None:  # fmt: skip
        params = sequence.request.params
        self._sequence, self._params, self._matcher = sequence, params, matcher
        self._text = Text(tokenizer, params.stop) if tokenizer else None
        self._eos = frozenset() if params.ignore_eos else eos
        self._ends = frozenset(params.stop_token_ids) | eos
        self._free = params.lazy  # whether the next token is drawn without the grammar
        self._tokens: list[int] = []
        self._prompt: list[dict[int, float] | None] = [None]
        self._told_prompt = False

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    @property
    def watched(self) -> bool:
        """Whether the next token must be drawn by `fill`."""
        return self._params.watched or (self._params.lazy and not self._free)

    def fill(self, row: np.ndarray) -> None:
        """Writes what may come next into a mask's row of ones (`decode.grammar.Matcher.fill`)."""
        if self._matcher is not None and not self._free:
            self._matcher.fill(row)
        banned = set(self._ends) if self.count < self._params.min_tokens else set()
        for word in self._params.bad_words:
            *before, last = word
            if not before or self._tokens[-len(before) :] == before:
                banned.add(last)
        for token in banned:
            if token // 32 < len(row):
                row[token // 32] &= np.int32(~np.uint32(1 << token % 32).view(np.int32))

    def score(self, chunk: Chunk, at: int, scored: Any) -> None:
        """Takes how likely the prompt's tokens of `chunk` were, which begins at token `at`."""
        prompt = self._sequence.request.prompt
        many = self._params.prompt_logprobs or 0
        logps, tokens = np.asarray(scored.logps), np.asarray(scored.top_tokens)
        top = np.asarray(scored.top_logps)
        for i in range(chunk.start, min(chunk.end, len(prompt) - 1)):
            if i + 1 < len(self._prompt):  # computed again after a preemption
                continue
            place = at + i - chunk.start
            found = {int(tokens[place, j]): float(top[place, j]) for j in range(many)}
            self._prompt.append(found | {prompt[i + 1]: float(logps[place])})

    def take(self, new: list[int], logps: list[float], likeliest: list[dict[int, float]]) -> Output:
        """What `new` tokens add. The first that ends the answer is its last.

        Those after one behind which a lazy grammar holds, and one that it does not allow, are not
        taken: they are to be drawn again.
        """
        text, reason, stop = "", None, None
        kept: list[int] = []
        for token in new:
            kept.append(token)
            self._tokens.append(token)
            if not math.isfinite(logps[len(kept) - 1]):
                raise ValueError(
                    "nothing may follow: what is allowed and what is not leave no token"
                )
            if not self._follows(token):
                if not self._free:
                    raise ValueError(f"grammar: token {token} does not follow")
                self._free = False
                del kept[-1], self._tokens[-1]
                break
            self._free = self._params.lazy and self._may_end
            early = self.count <= self._params.min_tokens
            if token in self._eos or token in self._params.stop_token_ids:
                reason = "stop"
                stop = token if token in self._params.stop_token_ids else None
            elif self._text is not None:
                more, found = self._text.push(token, early)
                text += more
                if found is not None:
                    reason, stop = "stop", found
            if reason is None and self._matcher is not None and self._matcher.done:
                reason = "stop"
            if reason is None and self.count == self._params.max_tokens:
                reason = "length"
            if reason is not None or (self._params.lazy and not self._free):
                break
        if reason is not None and self._text is not None and not isinstance(stop, str):
            rest, found = self._text.finish()
            text += rest
            if found is not None:
                reason, stop = "stop", found
        return self._output(text, kept, reason, stop, self._logprobs(kept, logps, likeliest))

    @property
    def _may_end(self) -> bool:
        return self._matcher is None or self._matcher.may_end

    def _follows(self, token: int) -> bool:
        if self._matcher is None or token in self._eos:
            return True
        if self._free and (token in self._ends or self._matcher.silent(token)):
            return True
        return self._matcher.accept(token)

    def broken_off(self, reason: FinishReason, error: str | None) -> Output:
        """The last output of an answer that did not come to its end."""
        return self._output("", [], reason, None, None, error)

    def _logprobs(
        self, kept: list[int], logps: list[float], likeliest: list[dict[int, float]]
    ) -> tuple[dict[int, float], ...] | None:
        many = self._params.logprobs
        if many is None:
            return None
        made = []
        for token, logp, top in zip(kept, logps, likeliest, strict=False):
            best = [(t, p) for t, p in list(top.items())[:many] if p > -np.inf]
            made.append({token: logp} | dict(best) | {token: logp})
        return tuple(made)

    def _output(
        self, text: str, tokens: list[int], reason: FinishReason | None, stop: Any, logprobs: Any,
        error: str | None = None,
    ) -> Output:  # fmt: skip
        request = self._sequence.request
        scores = None
        if self._params.prompt_logprobs is not None and not self._told_prompt and tokens:
            scores, self._told_prompt = tuple(self._prompt), True
        return Output(
            request.id, self._sequence.index, tuple(tokens), text, logprobs, scores, reason, stop,
            error, self._sequence.cached, len(request.prompt), self.count,
        )  # fmt: skip
