"""A model that guesses: a smaller one, or the first layers of the model itself (early exit).

A turn is one call of the device: `propose` guesses K tokens for every row, one after another, and
the step then computes all of them at once beside each row's last token (speculative decoding: arXiv
2211.17192, 2302.01318; first layers as the draft: LayerSkip, arXiv 2404.16710). What stands is the
sampler's matter (`decode.sampler.verified`).

Keys and values of a smaller model lie in pages of their own under the same page table, so that
sharing, copying and giving up pages need not know of it. It reads what it has not computed when it
is to guess (`read`); while drafts rest it costs nothing. First layers share the model's pages: what
they write there is what the step writes again.

Cost of a turn: K steps of the draft model and one step of the model with 1 + K tokens a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decode.packing import Layout
from decode.sampler import Offered, Wishes, offer
from jaxinfra.errors import UserError
from jaxinfra.model import cache as kv
from jaxinfra.model.config import ModelConfig

Forward = Callable[..., tuple[Float[Array, "T D"], Any]]


@dataclass(frozen=True)
class Drafter:
    """Which model guesses. params: its weights; None for the first layers of the model itself."""

    config: ModelConfig
    params: kv.DecodeParams | None = None

    def weights(self, model: kv.DecodeParams) -> kv.DecodeParams:
        """Its weights, given the model's."""
        if self.params is not None:
            return self.params
        return dataclasses.replace(model, layers=model.layers[: self.config.num_layers])


def first_layers(config: ModelConfig, count: int) -> Drafter:
    """The first layers of a model as its drafter. Raises UserError where there are not so many."""
    if not 0 < count < config.num_layers:
        raise UserError(
            f"engine: draft_model=first:{count}; give 1 to {config.num_layers - 1} layers"
        )
    windows = config.windows and config.windows[:count]
    return Drafter(config.replace(num_layers=count, windows=windows))


def propose(
    told: dict[str, Array],
    layout: Layout,
    tokens: Int[Array, " T"],
    pool: Any,
    forward: Forward,
    logits: Callable[[Array], Float[Array, "S V"]],
    wishes: Callable[[Array], Wishes | None],
    *,
    rereads: bool,
) -> tuple[Any, Int[Array, "B K"], Offered]:
    """The draft model's pages, its K guesses a row, and what is offered at each of T places.

    A row of 1 + n tokens has n guesses. forward: of the draft model, (pool, tokens, row, positions,
    starts, lengths, live) to hidden states and pages. rereads: the first pass takes the token
    before the last one too, which the draft model may not have read: the last guess of a turn is
    never an input.
    """
    B, K = layout.B, layout.drafts
    starts, rows = told["starts"], jnp.arange(B)
    first, wanted = starts[:-1], starts[1:] - starts[:-1] - 1
    begin = told["length"] - wanted - 1  # the position of the last token that is known
    real = jnp.sum(wanted >= 0)
    known = tokens[first]

    def ends(each: int) -> Array:
        return each * jnp.minimum(jnp.arange(B + 1), real)

    def guess(x: Array, i: Array | int) -> tuple[Array, Array]:
        return offer(logits(x), told, begin + i + 1, wishes(told["slot"]))

    if rereads:
        both = jnp.stack([told["before"], known], axis=1).reshape(-1)
        at = (begin[:, None] + jnp.arange(-1, 1)).reshape(-1)
        live = (jnp.repeat(wanted, 2) > 0) & (at >= 0)
        x, pool = forward(pool, both, jnp.repeat(rows, 2), at, ends(2), begin + 1, live)
        x = x[1::2]
    else:
        x, pool = forward(pool, known, rows, begin, ends(1), begin + 1, wanted > 0)
    guessed, chances = guess(x, 0)
    made = jnp.zeros((K, B), jnp.int32).at[0].set(guessed)
    likely = jnp.zeros((K, *chances.shape), chances.dtype).at[0].set(chances)

    def more(i: Array, carry: tuple) -> tuple:
        pool, made, likely = carry
        x, pool = forward(
            pool, made[i - 1], rows, begin + i, ends(1), begin + i + 1, i < wanted
        )  # fmt: skip
        guessed, chances = guess(x, i)
        return pool, made.at[i].set(guessed), likely.at[i].set(chances)

    pool, made, likely = jax.lax.fori_loop(1, K, more, (pool, made, likely))
    token = jnp.arange(layout.T)
    row = jnp.clip(jnp.sum(starts[None] <= token[:, None], axis=1) - 1, 0, B - 1)
    turn = token - first[row]
    at = jnp.clip(turn, 0, K - 1)
    there = (turn >= 0) & (turn < wanted[row])
    return pool, made.T, Offered(made[at, row], likely[at, row], there)


def put(
    tokens: Int[Array, " T"], told: dict[str, Array], guesses: Int[Array, "B K"]
) -> Int[Array, " T"]:
    """`tokens` with the guesses of each row behind its first token."""
    places = told["starts"][:-1, None] + 1 + jnp.arange(guesses.shape[1])
    places = jnp.where(places < told["starts"][1:, None], places, tokens.shape[0])
    return tokens.at[places].set(guesses, mode="drop")
