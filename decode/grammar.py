"""Structured output: which tokens may come next, as packed bits, by the llguidance library.

A JSON schema, a regular expression, a list of choices or a Lark grammar is compiled (1 ms, and 9 ms
for fifty tools; the last ones are kept) against the vocabulary (once a tokenizer, about 0.3 s for
49,000 tokens); a mask then costs some 50 microseconds a token, at worst a few milliseconds, on one
core while the device works, and V/8 bytes to send. A token costs 3 microseconds to accept.
Whatever a grammar or a schema gets wrong is one ValueError, and the other requests see nothing.
This module imports no jax.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

if TYPE_CHECKING:
    from decode.request import Grammar
    from jaxinfra.text import Tokenizer

# A grammar from a stranger may neither hold a core for long nor echo itself into logs.
_LIMITS = LLParserLimits(
    max_grammar_size=100_000, max_lexer_states=50_000, step_max_items=50_000, verbose_errors=False
)
_KEPT = 64  # compiled grammars
# Where a schema leaves white space free, small models write it without end; this is json.dumps's.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer

    def fill(self, row: Int32[np.ndarray, " W"]) -> None:
        """Writes the tokens that may come next: bit i % 32 of word i // 32 is token i.

        `row` is contiguous and of the compiler's `words`. A finished grammar allows the
        tokenizer's eos ids alone. Raises ValueError when the grammar grew beyond its limits.
        """
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"grammar: {_first_line(self._matcher.get_error())}")

    def accept(self, token: int) -> bool:
        """Goes on by `token`, or says False and stays where it was."""
        return self._matcher.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        """Takes back the last `count` accepted tokens, as when a draft was rejected."""
        if not self._matcher.rollback(count):
            raise ValueError(f"grammar: cannot take back {count} tokens")

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        """Whether what was accepted is an answer, be there more that may follow."""
        return self._matcher.is_accepting()

    def silent(self, token: int) -> bool:
        """Whether `token` writes nothing, as those that mark a conversation's parts."""
        return self._tokenizer.is_special_token(token)


class Compiler:
    """Grammars to matchers for one tokenizer and a model with `vocab_size` rows of logits."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if not tokenizer.eos_ids:
            raise ValueError("grammar: the tokenizer names no eos token to end an answer with")
        self.words = -(-vocab_size // 32)  # of a mask
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        ends = list(tokenizer.eos_ids)
        own = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=ends)
        added = tokenizer.backend.get_added_tokens_decoder()
        words = {i for i, one in added.items() if not one.special and own.is_special_token(i)}
        if words:
            made = TokenizerWrapper(_Vocabulary(tokenizer, own, words, vocab_size))
            own = LLTokenizer(made, n_vocab=vocab_size, eos_token=ends)
        self._tokenizer = own

    def compile(self, grammar: Grammar) -> Matcher:
        """The matcher at its beginning. Raises ValueError, in one line, on a bad grammar."""
        made = self._compiled.get(grammar)
        if made is None:
            made = LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=_LIMITS)
            if made.is_error():
                raise ValueError(f"{grammar.kind}: {_first_line(made.get_error())}")
            self._compiled[grammar] = made
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return Matcher(made.deep_copy(), self._tokenizer)


class _Vocabulary:
    """A tokenizer in which `words` are text. The library takes every name in angle brackets for
    a mark that no text may hold, and `<tool_call>` is one, though models write it as a word."""

    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, own: LLTokenizer, words: set[int], vocab_size: int
    ) -> None:
        self.eos_token_id = tokenizer.eos_ids[0]
        self.tokens = [own.decode_bytes([i]) for i in range(vocab_size)]
        marks = (i for i in range(vocab_size) if own.is_special_token(i))
        self.special_token_ids = [i for i in marks if i not in words]
        self._backend = tokenizer.backend

    def __call__(self, text: bytes) -> list[int]:
        return self._backend.encode(text.decode(), add_special_tokens=False).ids


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            try:
                return LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_STYLE)
            except ValueError as error:
                raise ValueError(f"json_schema: {_first_line(str(error))}") from None
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(_quoted(grammar.text)))
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
    raise ValueError(f"grammar: no kind {grammar.kind!r}; use json_schema, regex, choice or lark")


def _quoted(text: str) -> list[str]:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"choice: no JSON list of texts ({error})") from None
    whole = isinstance(choices, list) and all(isinstance(one, str) and one for one in choices)
    if not whole or not choices:
        raise ValueError("choice: give a JSON list of one or more texts, none of them empty")
    return [json.dumps(choice, ensure_ascii=False) for choice in choices]


def _first_line(message: str) -> str:
    return " ".join(message.split())[:300]
