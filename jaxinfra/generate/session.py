"""Completion and chat in the terminal, streamed, with what each answer cost beside it.

A conversation keeps its cache between turns. Each turn renders the whole chat anew and computes
only the tokens after the longest prefix that the cache already holds, so a template that rewrites
earlier turns costs time and is never wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxinfra.errors import UserError
from jaxinfra.generate.loop import Stream
from jaxinfra.generate.sampling import Sampling
from jaxinfra.loading import Model
from jaxinfra.model import cache as kv
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import MoE
from jaxinfra.text import Tokenizer

Pieces = Generator[str, None, None]
COMMANDS = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"


class Conversation:
    """A text or a chat that goes on: the tokens so far and the cache that holds them.

    `params` are `unstack`ed ones. `stream` is the latest `Stream`, None before the first.
    """

    def __init__(
        self,
        params: kv.DecodeParams,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    ) -> None:
        tokenizer.check(config)
        self._params, self._config, self._tokenizer = params, config, tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._max_new, self._sampling = max_new_tokens, sampling
        self._stop_ids = sorted({*config.eos_ids, *tokenizer.eos_ids})
        self._held: list[int] = []
        self._cache: kv.Cache | None = None
        self.stream: Stream | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets all messages but the system's; the cache stays and is used as far as it fits."""
        self.messages: list[dict[str, Any]] = [*self._system]

    def ask(self, text: str) -> Pieces:
        """Pieces of the answer to the user's `text`; broken off, what was given counts as said."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.encode_chat(messages)
        answer: list[str] = []
        pieces = self._continue(ids)

        def told() -> Pieces:
            try:
                for piece in pieces:
                    answer.append(piece)
                    yield piece
            finally:
                pieces.close()
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

        return told()

    def complete(self, text: str) -> Pieces:
        """Pieces of text that follow `text`."""
        return self._continue(self._tokenizer.encode(text))

    def _continue(self, ids: list[int]) -> Pieces:
        if not ids:
            raise UserError("prompt: holds no token; write some text")
        room = self._config.max_seq_len - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids)} tokens and the model takes "
                f"{self._config.max_seq_len}; begin a new one (/reset)"
            )
        shared = _shared(ids[:-1], self._held)  # one token at least must be computed
        cache = self._cache
        if cache is not None:
            cache = dataclasses.replace(cache, length=jnp.full((1,), shared, jnp.int32))
        stream = Stream(
            self._params, self._config, [ids[shared:]], max_new_tokens=min(self._max_new, room),
            sampling=self._sampling, stop_ids=self._stop_ids, cache=cache,
        )  # fmt: skip
        self.stream, self._cache, self._held = stream, None, []
        return self._pieces(stream, ids)

    def _pieces(self, stream: Stream, ids: list[int]) -> Pieces:
        words = self._tokenizer.stream()
        try:
            for (new,) in stream:
                if piece := "".join(map(words.push, new)):
                    yield piece
            if piece := words.finish():
                yield piece
        finally:
            # Ctrl-C may come between a call that was given the cache and what it gave back.
            if stream.tokens[0] and not stream.cache.length.is_deleted():
                self._cache, self._held = stream.cache, [*ids, *stream.tokens[0][:-1]]


def _shared(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def token_bytes(params: kv.DecodeParams, config: ModelConfig, context: int) -> int:
    """Bytes that decoding one token must read: its weights once, keys and values of `context`.

    Of the embedding one row counts as nothing; of a mixture's experts those that a token uses.
    """

    def layer_bytes(layer: Any) -> float:
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(layer))
        if isinstance(layer.mlp, MoE) and config.experts:
            experts = sum(w.nbytes for w in (layer.mlp.gate, layer.mlp.up, layer.mlp.down))
            total -= experts * (1 - config.experts.top_k / config.experts.num_experts)
        return total

    weights = sum(map(layer_bytes, params.layers)) + sum(
        leaf.nbytes for leaf in jax.tree.leaves(params.unembed)
    )
    keys = 2 * config.num_layers * config.num_kv_heads * config.head_dim * context
    return round(weights + keys * params.embed.dtype.itemsize)


def status(
    stream: Stream, params: kv.DecodeParams, config: ModelConfig, bandwidth: float | None
) -> str:
    """One line on an answer: tokens, tokens/s, time to first token, share of `bandwidth` (B/s)."""
    timings, count = stream.timings, len(stream.tokens[0])
    parts = [f"{count} tokens", f"{timings.decode_tokens_per_second:.1f} tokens/s",
             f"first after {timings.first_token:.2f} s"]  # fmt: skip
    if bandwidth and timings.decode_tokens:
        context = stream.prompt_end + count // 2
        share = token_bytes(params, config, context) * timings.decode_tokens_per_second / bandwidth
        parts.append(f"{share:.0%} of the {bandwidth / 1e9:.0f} GB/s bound")
    if timings.compile > 0.5:
        parts.append(f"compiled in {timings.compile:.1f} s")
    return ", ".join(parts)


def run(
    model: Model,
    prompt: str | None = None,
    *,
    chat: bool | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
    bandwidth: float | None = None,
    console: Console | None = None,
) -> None:
    """Answers `prompt`, or what is typed line by line until /exit, on the `console`.

    Args:
      model: what `jaxinfra.load` gave; its weights are unstacked here, into a second copy.
      chat: answer by the chat template; by default where the tokenizer has one. Otherwise complete.
      bandwidth: bytes/s that the device's memory gives, for the share in the status line.
    """
    console = console or Console()
    chat = model.tokenizer.chat_template is not None if chat is None else chat
    if system is not None and not chat:
        raise UserError("system: only a chat has a system's message; leave it out to complete")
    params = kv.unstack(model.params, model.config)
    conversation = Conversation(
        params, model.config, model.tokenizer,
        system=system, max_new_tokens=max_new_tokens, sampling=sampling,
    )  # fmt: skip

    def answer(text: str) -> None:
        pieces = None
        try:
            with console.status("preparing"):
                pieces = conversation.ask(text) if chat else conversation.complete(text)
            for piece in pieces:
                console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            if pieces is None or conversation.stream is None:
                console.print()
                return
            pieces.close()
        assert conversation.stream is not None
        line = status(conversation.stream, params, model.config, bandwidth)
        console.print(f"\n[dim]{line}[/dim]", highlight=False)

    if prompt is not None:
        answer(prompt)
        return
    console.print(f"[dim]{COMMANDS}[/dim]", highlight=False)
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            console.print(f"[dim]{COMMANDS}[/dim]", highlight=False)
        elif text:
            try:
                answer(text)
            except UserError as error:
                console.print(f"[red]{error}[/red]", highlight=False)
