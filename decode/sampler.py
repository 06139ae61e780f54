"""From logits to tokens on the device, each row by its own rules; all of them are arrays.

In this order: repetition, presence and frequency penalties, bias, mask, temperature, top-k, top-p,
min-p, and one uniform number for the draw, which depends on the row's key and the token's position
alone: an answer is the same in any batch and after a preemption, and, where a seed was given, with
drafts and without (`verified`). Log-probabilities are those of the distribution that was drawn
from; of a greedy row, those at temperature 1.

Nothing sorts the vocabulary: top-k and top-p find the least kept value by bisection over the bits
of floats, 31 passes; a draw sums blocks of the vocabulary and looks into one. What no row of a step
wants is skipped on the device (`lax.cond`), so there is one program for all wishes. On a GPU a
condition makes the host wait until it is known: steps in which no row has a wish have a program of
their own there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from decode.request import LIKELIEST
from pallas_kernels import token_draw

SEEN = 1 << 20  # in `counts`: the prompt has the token; below it, times the answer has it
_BLOCK = 512
_GUESS, _TAKE = 1, 2  # uses of a position's numbers, beside the draw itself


@struct.dataclass
class Drawn:
    """What was chosen at S places."""

    tokens: Int[Array, " S"]
    logps: Float[Array, " S"]
    top_tokens: Int[Array, "S 20"]
    top_logps: Float[Array, "S 20"]


def uniform(
    key_0: Int[Array, " S"], key_1: Int[Array, " S"], positions: Int[Array, " S"], use: int = 0
) -> Float[Array, " S"]:
    """One number from 0 to 1 for each key and position (threefry), another for each `use`."""

    def one(first: Array, second: Array, position: Array) -> Array:
        words = jnp.stack([first, second]).astype(jnp.uint32)
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        key = jax.random.fold_in(key, position)
        return jax.random.uniform(jax.random.fold_in(key, use) if use else key)

    return jax.vmap(one)(key_0, key_1, positions)


@struct.dataclass
class Wishes:
    """What rows may want beside a temperature.

    counts: by slot, how often the answer has each token, plus 2**20 where the prompt has it.
    bias: by slot. mask: bit i % 32 of word i // 32 allows token i. switches: which of penalties,
    truncation, likeliest tokens any row wants; the fourth is unread.
    """

    counts: Int[Array, "R V"]
    bias: Float[Array, "R V"]
    slot: Int[Array, " S"]
    mask: UInt32[Array, "S W"] | None  # None: every token is allowed
    switches: Int[Array, " 4"]


def sample(
    logits: Float[Array, "S V"],
    rows: dict[str, Any],
    positions: Int[Array, " S"],
    wishes: Wishes | None,
    offered: Offered | None = None,
) -> Drawn:
    """The tokens that stand at `positions`.

    rows: by name, [S] each, as `decode.packing.ROW`. wishes: None where no row has any. offered:
    what a draft model guessed.
    """
    u = uniform(rows["key_0"], rows["key_1"], positions)
    if wishes is None and offered is None and token_draw.supported(logits.shape) is None:
        tokens, logps = token_draw.draw(logits, rows["temperature"], u)
        return Drawn(tokens, logps, *_nothing(*logits.shape))
    logits = _shaped(logits, rows, wishes)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    drawn = (
        _draw(weights, u) if offered is None else verified(weights, u, offered, rows, positions)
    )  # fmt: skip
    tokens = jnp.where(rows["temperature"] == 0.0, jnp.argmax(logits, axis=-1), drawn)
    tokens = jnp.minimum(tokens, logits.shape[1] - 1).astype(jnp.int32)  # where nothing may follow
    norm = top + jnp.log(jnp.sum(weights, axis=-1, keepdims=True))
    logps = jnp.take_along_axis(logits, tokens[:, None], axis=1) - norm
    wanted = None if wishes is None else wishes.switches[2] > 0
    top_tokens, top_logps = likeliest_of(logits - norm, wanted)
    return Drawn(tokens, logps[:, 0], top_tokens, top_logps)


@struct.dataclass
class Offered:
    """What a draft model guessed for S places: a token, drawn from chances that sum to 1."""

    tokens: Int[Array, " S"]
    chances: Float[Array, "S V"]
    there: Bool[Array, " S"]  # whether there is a guess


def offer(
    logits: Float[Array, "S V"], rows: dict[str, Any], positions: Int[Array, " S"],
    wishes: Wishes | None,
) -> tuple[Int[Array, " S"], Float[Array, "S V"]]:  # fmt: skip
    """A draft model's tokens for `positions`, and the chances [S, V] that they are drawn from."""
    logits = _shaped(logits, rows, wishes)
    chances = jax.nn.softmax(logits, axis=-1)
    keys = rows["key_0"], rows["key_1"], positions
    u = jnp.where(rows["seeded"] > 0, uniform(*keys), uniform(*keys, use=_GUESS))
    greedy = rows["temperature"] == 0.0
    tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), _draw(chances, u))
    return jnp.minimum(tokens, logits.shape[1] - 1).astype(jnp.int32), chances


def verified(
    weights: Float[Array, "S V"], u: Float[Array, " S"], offered: Offered, rows: dict[str, Any],
    positions: Int[Array, " S"],
) -> Int[Array, " S"]:  # fmt: skip
    """Draws from `weights`, taking guesses where it can without changing what is likely.

    A row without a seed takes a guess with the chance min(1, p / q) and else draws from what p has
    more than q (rejection: arXiv 2211.17192, 2302.01318): that is p, and no other way takes more
    guesses. A row with one draws as if nothing had been guessed, by the number that the guess was
    drawn by: the answer is the same with and without drafts, and fewer guesses stand.
    """
    p = weights / jnp.sum(weights, axis=-1, keepdims=True)
    here, guess = offered.tokens[:, None], uniform(rows["key_0"], rows["key_1"], positions, _TAKE)
    p_here, q_here = (jnp.take_along_axis(a, here, axis=1)[:, 0] for a in (p, offered.chances))
    rest = jnp.maximum(p - offered.chances, 0.0)
    rejects = offered.there & (rows["seeded"] == 0)
    taken = rejects & ((guess * q_here < p_here) | (jnp.sum(rest, axis=-1) == 0.0))
    return jnp.where(taken, offered.tokens, _draw(jnp.where(rejects[:, None], rest, weights), u))


def likeliest_of(logps: Float[Array, "S V"], wanted: Bool[Array, ""] | None) -> tuple[Array, Array]:
    """The LIKELIEST tokens [S, 20] and their log-probabilities; zeros where none are wanted."""

    def found(logps: Array) -> tuple[Array, Array]:
        values, tokens = jax.lax.top_k(logps, min(LIKELIEST, logps.shape[1]))
        return tokens.astype(jnp.int32), values

    nothing = _nothing(*logps.shape)
    return nothing if wanted is None else jax.lax.cond(wanted, found, lambda _: nothing, logps)


def _nothing(S: int, V: int) -> tuple[Array, Array]:
    shape = S, min(LIKELIEST, V)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)


def _shaped(logits: Array, rows: dict[str, Any], wishes: Wishes | None) -> Array:
    """Logits of the distribution that is drawn from; of a greedy row, those at temperature 1."""
    if wishes is not None:
        counts, slot, switches = wishes.counts, wishes.slot, wishes.switches > 0
        logits = jax.lax.cond(
            switches[0], lambda x: _penalised(x, rows, counts[slot]), lambda x: x, logits
        )
        logits = logits + wishes.bias[slot]
        if wishes.mask is not None:
            logits = jnp.where(_bits(wishes.mask, logits.shape[1]), logits, -jnp.inf)
    greedy = rows["temperature"] == 0.0
    logits = logits / jnp.where(greedy, 1.0, jnp.maximum(rows["temperature"], 1e-5))[:, None]
    if wishes is not None:
        logits = jax.lax.cond(switches[1], _truncated, lambda x, _: x, logits, rows)
    return logits


def _penalised(logits: Array, rows: dict[str, Any], counts: Array) -> Array:
    """Repetition (arXiv 1909.05858) of prompt and answer; presence and frequency of the answer."""
    seen, made = counts > 0, counts % SEEN
    factor = rows["repetition"][:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    times = made.astype(jnp.float32)
    logits = logits - rows["frequency"][:, None] * times
    return logits - rows["presence"][:, None] * jnp.sign(times)


def _bits(mask: UInt32[Array, "S W"], size: int) -> Bool[Array, "S V"]:
    shifts = jnp.arange(32, dtype=jnp.uint32)
    bits = (mask[:, :, None] >> shifts) & jnp.uint32(1)
    return bits.reshape(mask.shape[0], -1)[:, :size] > 0


def _truncated(logits: Float[Array, "S V"], rows: dict[str, Any]) -> Float[Array, "S V"]:
    """-inf outside top-k, then top-p of what is left, then min-p; ties are kept together."""
    p = jax.nn.softmax(logits, axis=-1)
    k = jnp.where(rows["top_k"] > 0, rows["top_k"], logits.shape[1])
    p = jnp.where(p >= _least(p, jnp.ones_like(p), k.astype(jnp.float32))[:, None], p, 0.0)
    p = p / jnp.sum(p, axis=-1, keepdims=True)
    p = jnp.where(p >= _least(p, p, rows["top_p"])[:, None], p, 0.0)
    least = rows["min_p"] * jnp.max(p, axis=-1)
    return jnp.where((p > 0.0) & (p >= least[:, None]), logits, -jnp.inf)


def _least(
    p: Float[Array, "S V"], weight: Float[Array, "S V"], wanted: Float[Array, " S"]
) -> Float[Array, " S"]:
    """The largest t for which the weights of all p >= t sum to `wanted` or more; else 0.

    Positive floats are ordered as their bits are, so halving an interval of int32 is exact.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        least = jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        enough = jnp.sum(jnp.where(p >= least, weight, 0.0), axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jax.lax.bitcast_convert_type(jnp.max(p, axis=-1), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _draw(weights: Float[Array, "S V"], u: Float[Array, " S"]) -> Int[Array, " S"]:
    """The token at which the running sum of `weights` passes u times the whole.

    Never one of weight zero: rounding may lead past the last token of a block, not to one that
    must not be drawn.
    """
    S, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(S, -1, _BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    block, rest = _passing(sums, u * jnp.sum(sums, axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, _ = _passing(inside, rest)
    return block * _BLOCK + place


def _passing(weights: Float[Array, "S n"], target: Array) -> tuple[Array, Array]:
    """Where the running sum passes `target`, among positive weights, and what is left there."""
    sums = jnp.cumsum(weights, axis=-1)
    passed = (sums > target[:, None]) & (weights > 0)
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    at = jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed, axis=-1), last)
    before = jnp.take_along_axis(sums - weights, at[:, None], axis=1)[:, 0]
    return at, target - before
