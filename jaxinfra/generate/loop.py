"""Generation on the device: one prefill call, then a loop that decodes several tokens a call.

Prompts are padded to 16, 24, 32, 48, 64, 96, ... tokens and the cache's capacity is a power of two,
so that few programs are compiled; each is compiled before the clock starts. A decode call runs up
to `steps` tokens in a `lax.while_loop` and feeds them back on the device; off a GPU it stops when
all rows have met a stop id. Its tokens are fetched while the next call runs. Parameters and cache
have the same dtype.

Cost of a token: see `jaxinfra.model.cache`; a call adds one dispatch and one fetch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Key

from jaxinfra.errors import UserError
from jaxinfra.generate.sampling import Sampling, row_keys, sample
from jaxinfra.model import cache as kv
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params

STEPS = {"cpu": 4, "gpu": 32, "tpu": 32}  # tokens a call: about a tenth of a second of streaming
MIN_PROMPT = 16
MIN_CAPACITY = 256


@struct.dataclass
class State:
    """What a decode call takes and gives: the last tokens are not in the cache yet."""

    cache: kv.Cache
    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    left: Int[Array, ""]  # tokens each row may still produce


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds: compilation apart, then to the first token of every row, then all others."""

    compile: float
    first_token: float
    decode: float
    decode_tokens: int  # of all rows, the first of each not counted

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens of all rows after the first of each, by the time they took; 0 if there is none."""
        return self.decode_tokens / self.decode if self.decode_tokens else 0.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """Tokens of each row (a stop id ends them and is included) and why the row ended."""

    tokens: list[list[int]]
    finish: list[str]  # "stop" or "length"
    timings: Timings


def bucket(count: int, least: int, most: int, *, half: bool = False) -> int:
    """The power of two from `least` that holds `count`, cut at `most`; `half`: or 3/4 of one."""
    power = max(least, 1 << (count - 1).bit_length())
    if half and count <= power * 3 // 4 and power > least:
        power = power * 3 // 4
    return min(power, most)


def capacity_for(config: ModelConfig, prompt: int, max_new_tokens: int) -> int:
    """The cache capacity for `prompt` tokens and the new ones; a UserError if the model's is less.

    The last new token needs no place in the cache, but counts: a next turn will append it.
    """
    if prompt + max_new_tokens > config.max_seq_len:
        raise UserError(
            f"prompt of {prompt} tokens + max_new_tokens={max_new_tokens} exceeds the model's "
            f"max_seq_len={config.max_seq_len}; shorten the prompt or ask for at most "
            f"{max(config.max_seq_len - prompt, 0)} new tokens"
        )
    return bucket(prompt + max_new_tokens, MIN_CAPACITY, config.max_seq_len)


def prefill(
    params: kv.DecodeParams,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: kv.Cache,
    keys: Key[Array, " B"],
    stop_ids: Int[Array, " n"],
    max_new_tokens: Int[Array, ""],
    *,
    config: ModelConfig,
    sampling: Sampling,
    fresh: bool,
) -> State:
    """Takes the prompts, right-padded to T, into the cache and draws the first new token."""
    x, cache = kv.extend(params, config, tokens, cache, lengths=lengths, fresh=fresh)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
    token = sample(kv.head(params, config, last)[:, 0], sampling, keys, cache.length)
    return State(cache, token, jnp.isin(token, stop_ids), max_new_tokens - 1)


def decode(
    params: kv.DecodeParams,
    state: State,
    keys: Key[Array, " B"],
    stop_ids: Int[Array, " n"],
    *,
    config: ModelConfig,
    sampling: Sampling,
    steps: int,
) -> tuple[State, Int[Array, "B steps"]]:
    """Up to `steps` more tokens of each row; -1 where a row had ended."""

    def going(carry: tuple) -> Array:
        i, state, _ = carry
        if jax.default_backend() == "gpu":  # where a loop of known length needs no word of the host
            return i < steps
        return (i < steps) & (state.left > 0) & ~jnp.all(state.done)

    def body(carry: tuple) -> tuple:
        i, state, block = carry
        live = ~state.done & (state.left > 0)
        x, cache = kv.extend(
            params, config, state.token[:, None], state.cache, lengths=live.astype(jnp.int32)
        )
        token = sample(kv.head(params, config, x)[:, 0], sampling, keys, cache.length)
        block = block.at[:, i].set(jnp.where(live, token, -1))
        done = state.done | jnp.isin(token, stop_ids)
        return i + 1, State(cache, token, done, state.left - 1), block

    block = jnp.full((state.token.shape[0], steps), -1, jnp.int32)
    _, state, block = jax.lax.while_loop(going, body, (jnp.int32(0), state, block))
    return state, block


class Stream:
    """An iterator over new tokens: each step gives, for every row, the list of those that are new.

    `tokens`, `finish`, `timings` and `cache` tell the state at any time.
    """

    def __init__(
        self,
        params: Params | kv.DecodeParams,
        config: ModelConfig,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
        stop_ids: Sequence[int] = (),
        seeds: Sequence[int] | None = None,
        cache: kv.Cache | None = None,
        steps: int | None = None,
    ) -> None:
        """Compiles what is not compiled yet; nothing runs before the first `next`.

        Args:
          params: `unstack`ed ones are used as they are; `Params` are unstacked, a copy of them all.
          prompts: token ids of each row, of any lengths.
          stop_ids: a row ends with the first of these.
          seeds: one a row for its draws; by default the row's number.
          cache: what the prompts continue, for all rows; it is donated, so use `self.cache` later.
          steps: tokens a decode call; STEPS of the backend by default.
        """
        _check(prompts, config, max_new_tokens)
        if isinstance(params, Params):
            params = kv.unstack(params, config)
        B, longest = len(prompts), max(len(p) for p in prompts)
        held = 0 if cache is None else int(cache.length.max())
        capacity = capacity_for(config, held + longest, max_new_tokens)
        if cache is None:
            cache = kv.empty(config, B, capacity, params.embed.dtype)
        elif cache.k[0].shape[2] < capacity:
            cache = kv.grow(cache, capacity)
        width = bucket(longest, MIN_PROMPT, cache.k[0].shape[2] - held, half=True)
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        keys = row_keys(sampling, range(B) if seeds is None else seeds)
        stop = jnp.asarray([*stop_ids] or [-1], jnp.int32)
        lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
        first = (
            params, jnp.asarray(padded, jnp.int32), lengths, cache, keys, stop,
            jnp.asarray(max_new_tokens, jnp.int32),
        )  # fmt: skip
        static = {"config": config, "sampling": dataclasses.replace(sampling, seed=0)}
        steps = steps or STEPS.get(jax.default_backend(), 32)
        start = time.perf_counter()
        run_prefill = _compiled(prefill, first, "cache", **static, fresh=held == 0)
        state = State(cache, lengths, lengths > 0, first[-1])  # the shapes of what prefill gives
        more = (params, state, keys, stop)
        run_decode = _compiled(decode, more, "state", **static, steps=steps)
        self._compile_s = time.perf_counter() - start
        self._first_s = self._decode_s = 0.0
        self._max_new, self._stop_ids = max_new_tokens, frozenset(stop_ids)
        self._cache = cache
        self.prompt_end = held + longest  # tokens in the longest row before the first new one
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.finish: list[str | None] = [None] * B
        self._blocks = self._run(run_prefill, first, run_decode, (params, keys, stop), steps)

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self

    def __next__(self) -> list[list[int]]:
        return next(self._blocks)

    def _run(self, run_prefill: Any, first: tuple, run_decode: Any, rest: tuple, steps: int):
        params, keys, stop = rest
        start = time.perf_counter()
        state = run_prefill(*first)
        self._cache = state.cache
        # Given before the loop starts: on a GPU the loop's call returns when it is nearly done.
        new = self._accept(np.asarray(state.token[:, None]))
        self._first_s = time.perf_counter() - start
        yield new
        pending, called = None, 1
        while True:
            ahead = None
            if called < self._max_new and None in self.finish:
                state, ahead = run_decode(params, state, keys, stop)
                self._cache = state.cache
                called += steps
            if pending is not None:
                new = self._accept(np.asarray(pending))
                self._decode_s = time.perf_counter() - start - self._first_s
                if any(new):
                    yield new
            if ahead is None:
                return
            pending = ahead

    def _accept(self, block: np.ndarray) -> list[list[int]]:
        new = [[int(token) for token in row if token >= 0] for row in block]
        for i, row in enumerate(new):
            self.tokens[i] += row
            if row and row[-1] in self._stop_ids:
                self.finish[i] = "stop"
            elif len(self.tokens[i]) == self._max_new:
                self.finish[i] = "length"
        return new

    @property
    def cache(self) -> kv.Cache:
        """The cache after the calls made so far, up to `steps` tokens ahead of those seen."""
        return self._cache

    @property
    def timings(self) -> Timings:
        """The times so far; what the consumer does between steps is in them."""
        later = sum(max(len(row) - 1, 0) for row in self.tokens)
        return Timings(self._compile_s, self._first_s, self._decode_s, later)


def generate(
    params: Params | kv.DecodeParams,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    **options: Any,
) -> Generation:
    """All rows' tokens; `on_tokens` receives what `Stream` gives, `options` are those of `Stream`.

    Raises UserError where a prompt is empty, holds an id beyond the vocabulary, or leaves no room
    for `max_new_tokens` in the model's max_seq_len.
    """
    stream = Stream(params, config, prompts, max_new_tokens=max_new_tokens, **options)
    for new in stream:
        if on_tokens is not None:
            on_tokens(new)
    return Generation(stream.tokens, [str(reason) for reason in stream.finish], stream.timings)


_programs: dict[tuple, jax.stages.Compiled] = {}


def _compiled(function: Callable, args: tuple, donate: str, **static: Any) -> jax.stages.Compiled:
    """The program of `function` for the shapes of `args`, compiled once a process."""
    leaves, tree = jax.tree.flatten(args)
    types = tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
    key = (function, tree, types, *static.items())
    if key not in _programs:
        jitted = jax.jit(function, static_argnames=tuple(static), donate_argnames=donate)
        _programs[key] = jitted.lower(*args, **static).compile()
    return _programs[key]


def _check(prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int) -> None:
    if any(isinstance(prompt, str) or not isinstance(prompt, Sequence) for prompt in prompts):
        raise UserError("prompts: give lists of token ids, such as [model.tokenizer.encode(text)]")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("prompts: give at least one, each of one token or more")
    for i, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(
                f"prompts[{i}]: token ids from {min(prompt)} to {max(prompt)} do not fit the "
                f"model's vocab_size={config.vocab_size}; use the tokenizer that belongs to it"
            )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: give 1 or more")
