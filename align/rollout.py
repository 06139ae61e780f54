"""Answers of a policy to prompts, with a key/value cache, inside a program of any size.

The prompts of all groups go through the model once, as the trainer's batches do; each one's cache
is then copied to the G samples of its group, and a `lax.while_loop` draws a token of every row a
turn until all have ended. A row's draw depends on the key, the row and the position alone. `begin`,
`advance` and `finish` are `rollout` taken apart, for hosts that change the weights between tokens.

Cost of T tokens: T times a decode step (`jaxinfra.model.cache`) of B rows; it runs to the longest
answer, so where the mean is under about half of it, continuous batching does less work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from align.logprobs import log_distribution
from jaxinfra.errors import UserError
from jaxinfra.generate import Sampling
from jaxinfra.model import cache as kv
from jaxinfra.model import transformer as model
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params


@struct.dataclass
class Rollout:
    """B answers of at most T tokens to prompts of at most P; rows of a group stand together."""

    tokens: Int[Array, "B S"]  # prompt and answer without a gap, S = P + T, then `pad`
    lengths: Int[Array, " B"]  # tokens of each prompt
    answer: Int[Array, "B T"]  # the stop token is included, `pad` after it
    mask: Float[Array, "B T"]  # 1 where the answer has a token
    logps: Float[Array, "B T"]  # of the sampler, under the distribution it drew from; else 0
    stopped: Float[Array, " B"]  # 1 where the answer ended by itself


@struct.dataclass
class Generation:
    """Answers under way: what goes from token to token, for B = N x group_size rows."""

    prompts: Int[Array, "N P"]
    lengths: Int[Array, " N"]
    t: Int[Array, ""]  # tokens drawn for each row that has not ended
    cache: kv.Cache
    done: Bool[Array, " B"]
    answer: Int[Array, "B T"]
    logps: Float[Array, "B T"]
    mask: Float[Array, "B T"]


def rollout(
    params: Params,
    config: ModelConfig,
    prompts: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    key: Key[Array, ""],
    *,
    group_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_id: int,
    pad_id: int = 0,
) -> Rollout:
    """`group_size` answers to each of N prompts, which are padded at the right.

    Raises UserError where prompt and answer do not fit the model's max_seq_len.
    """
    how: Any = {"sampling": sampling, "stop_id": stop_id, "pad_id": pad_id}
    generation = begin(
        params, config, prompts, lengths, key, group_size=group_size,
        max_new_tokens=max_new_tokens, **how,
    )  # fmt: skip
    return finish(advance(params, config, generation, key, max_new_tokens, **how), pad_id=pad_id)


def begin(
    params: Params,
    config: ModelConfig,
    prompts: Int[Array, "N P"],
    lengths: Int[Array, " N"],
    key: Key[Array, ""],
    *,
    group_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_id: int,
    pad_id: int = 0,
) -> Generation:
    """The prompts read, and the first token of each answer drawn."""
    P, T, B = prompts.shape[1], max_new_tokens, prompts.shape[0] * group_size
    if config.max_seq_len < P + T:
        raise UserError(
            f"rollout: prompts of {P} + max_new_tokens={T} exceed the model's max_seq_len="
            f"{config.max_seq_len}; shorten one of them"
        )
    x, cache = kv.prefill(params, config, prompts, lengths, capacity=P + T, copies=group_size)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
    first = jnp.repeat(model.head(params, config, last)[:, 0], group_size, axis=0)
    token, logp = _drawer(key, B, sampling)(first, jnp.int32(0))
    answer = jnp.full((B, T), pad_id, jnp.int32).at[:, 0].set(token)
    logps, mask = jnp.zeros((2, B, T), jnp.float32)
    return Generation(
        prompts, lengths, jnp.int32(1), cache, token == stop_id, answer,
        logps.at[:, 0].set(logp), mask.at[:, 0].set(1.0),
    )  # fmt: skip


def advance(
    params: Params,
    config: ModelConfig,
    generation: Generation,
    key: Key[Array, ""],
    until: int | Int[Array, ""],
    *,
    sampling: Sampling,
    stop_id: int,
    pad_id: int = 0,
) -> Generation:
    """Draws on to `until` tokens a row, or until all rows have ended; `key` is that of `begin`.

    `params` may be newer than those the answers began with: keys and values that are in the cache
    stay those of the older ones, as in PipelineRL (arXiv 2509.19128).
    """
    fused = kv.unstack(params, config)
    B, T = generation.answer.shape
    draw = _drawer(key, B, sampling)

    def going(g: Generation) -> Array:
        return (g.t < jnp.minimum(until, T)) & ~jnp.all(g.done)

    def turn(g: Generation) -> Generation:
        live = (~g.done).astype(jnp.int32)
        token = jax.lax.dynamic_index_in_dim(g.answer, g.t - 1, axis=1)
        x, cache = kv.extend(fused, config, token, g.cache, lengths=live)
        token, logp = draw(kv.head(fused, config, x)[:, 0], g.t)
        return Generation(
            g.prompts, g.lengths, g.t + 1, cache, g.done | (token == stop_id),
            g.answer.at[:, g.t].set(jnp.where(g.done, pad_id, token)),
            g.logps.at[:, g.t].set(jnp.where(g.done, 0.0, logp)),
            g.mask.at[:, g.t].set(live.astype(jnp.float32)),
        )  # fmt: skip

    return jax.lax.while_loop(going, turn, generation)


def finish(generation: Generation, *, pad_id: int = 0) -> Rollout:
    """The answers, as they are by now."""
    g = generation
    G = g.answer.shape[0] // g.prompts.shape[0]
    prompts, lengths = jax.tree.map(lambda a: jnp.repeat(a, G, axis=0), (g.prompts, g.lengths))
    tokens = joined(prompts, lengths, g.answer, g.mask, pad_id)
    return Rollout(tokens, lengths, g.answer, g.mask, g.logps, g.done.astype(jnp.float32))


def joined(
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    answer: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    pad_id: int,
) -> Int[Array, "B S"]:
    """Each row's prompt and, right after its last token, its answer."""
    B, P = prompts.shape
    T = answer.shape[1]
    real = jnp.where(jnp.arange(P) < lengths[:, None], prompts, pad_id)
    row, place = jnp.arange(B)[:, None], lengths[:, None] + jnp.arange(T)
    tokens = jnp.pad(real, ((0, 0), (0, T)), constant_values=pad_id)
    return tokens.at[row, place].set(jnp.where(mask > 0, answer, pad_id))


def _drawer(
    key: Key[Array, ""], B: int, sampling: Sampling
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """A function of logits [B, V] and position: the tokens drawn, and their log-probabilities."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))

    def draw(logits: Array, position: Array) -> tuple[Array, Array]:
        logps = log_distribution(logits, sampling)
        if sampling.temperature == 0.0:
            token = jnp.argmax(logps, axis=-1)
        else:
            token = jax.vmap(
                lambda k, row: jax.random.categorical(jax.random.fold_in(k, position), row)
            )(keys, logps)
        token = token.astype(jnp.int32)
        return token, jnp.take_along_axis(logps, token[:, None], axis=1)[:, 0]

    return draw
