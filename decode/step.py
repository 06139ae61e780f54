"""One call of the device: a step of the engine, or several tokens of every row.

Its arguments are the weights, what the device remembers (donated, so that pages are written in
place), one packed array and two that rarely change; what comes back is small. Tokens that were made
in the call before are taken from the device, so that the host need not have seen them yet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from decode import forward as paged
from decode.draft import Drafter, propose, put
from decode.packing import Layout
from decode.sampler import SEEN, Drawn, Wishes, likeliest_of, sample
from jaxinfra.model import cache as kv
from jaxinfra.model.config import ModelConfig
from pallas_kernels.paged_attention.rows import places


@struct.dataclass
class State:
    """What the device keeps: pages, and by slot of a running sequence what its draws look at."""

    pool: tuple[paged.LayerPages, ...]
    last: Int[Array, " R"]  # the token made last
    counts: Int[Array, "R V"]  # tokens of its answer, plus 2**20 for those of its prompt
    bias: Float[Array, "R V"]  # on logits; -inf for what is not allowed
    draft: tuple[paged.LayerPages, ...] = ()  # pages of a smaller model that guesses


@struct.dataclass
class Out:
    """What a call made: for each of its K tokens, S draws; of prompts, how likely they were."""

    drawn: Drawn | None  # [K, S] and [K, S, 20]
    prompt: Drawn | None  # how likely each of T tokens' next was; zeros where nobody asked
    drafts: Int[Array, "B K"] | None = None  # what a draft model guessed


def step(
    params: kv.DecodeParams,
    state: State,
    packed: Int[Array, " n"],
    mask: UInt32[Array, "S W"],
    draft: kv.DecodeParams | None = None,
    *,
    config: ModelConfig,
    layout: Layout,
    drafter: Drafter | None = None,
    invariant: bool = False,
    implementation: str | None = None,
    axis: str | None = None,
) -> tuple[State, Out]:
    """Computes a packed step. mask: what may be drawn at each place (`decode.sampler.sample`).

    draft: weights of `drafter`, unless they are the model's. invariant, implementation, axis: of
    `decode.forward.forward`.
    """
    told = layout.unpack(packed)
    R = state.last.shape[0]
    row, position = places(told["starts"], told["length"], layout.T)
    real = jnp.arange(layout.T) < told["starts"][-1]
    options = {"invariant": invariant, "implementation": implementation, "axis": axis}
    size = state.pool[0].k.shape[2]

    def within(lengths: Array) -> Array:  # rows that have ended go on beside others in a call
        return jnp.minimum(lengths, layout.M * size)

    def slots(row: Array, at: Array, live: Array) -> Array:
        page = told["table"][row, jnp.maximum(at, 0) // size]
        return jnp.where(live, page * size + at % size, -1)

    tokens = told["tokens"]
    tokens = jnp.where(tokens < 0, state.last[jnp.minimum(-1 - tokens, R - 1)], tokens)
    offered = guesses = None
    if drafter is not None:
        separate = draft is not None
        own = draft if separate else drafter.weights(params)

        def guess(pool: Any, tokens: Array, row: Array, at: Array, starts: Array, lengths: Array,
                  live: Array) -> Any:  # fmt: skip
            return paged.forward(own, drafter.config, pool, tokens, at, slots(row, at, live),
                                 told["table"], starts, within(lengths), **options)  # fmt: skip

        if layout.reads:
            _, pool = guess(
                state.draft, tokens, row, position, told["starts"], told["length"], real
            )
            return replace(state, draft=pool), Out(None, None)
        L = drafter.config.num_layers

        def wishes(slot: Array) -> Wishes | None:
            switches = told["switches"].at[0].set(0)  # no row whose tokens are counted has drafts
            return None if layout.plain else Wishes(state.counts, state.bias, slot, None, switches)

        pool, guesses, offered = propose(
            told, layout, tokens, state.draft if separate else state.pool[:L], guess,
            lambda x: _logits(own, drafter.config, x, axis), wishes, rereads=separate,
        )  # fmt: skip
        kept = {"draft": pool} if separate else {"pool": (*pool, *state.pool[L:])}
        state, tokens = replace(state, **kept), put(tokens, told, guesses)
    places_drawn = jnp.maximum(told["sample"], 0)
    drawn_row = row[places_drawn]
    rows = {name: told[name][drawn_row] for name in _DRAWS}
    slot = told["slot"][drawn_row]

    def forward(pool: Any, tokens: Array, at: Array, lengths: Array, live: Array) -> Any:
        return paged.forward(params, config, pool, tokens, at, slots(row, at, live), told["table"],
                             told["starts"], within(lengths), **options)  # fmt: skip

    def draw(state: State, x: Array, at: Array, live: Array) -> tuple[State, Drawn]:
        logits = _logits(params, config, x, axis)
        wishes = Wishes(state.counts, state.bias, slot, mask, told["switches"])
        drawn = sample(logits, rows, at, None if layout.plain else wishes, offered)
        kept = jnp.where(live, slot, R)
        state = replace(state, last=state.last.at[kept].set(drawn.tokens, mode="drop"))
        if not layout.plain:
            counts = state.counts.at[kept, drawn.tokens].add(1, mode="drop")
            state = replace(state, counts=counts)
        return state, drawn

    x, pool = forward(state.pool, tokens, position, told["length"], real)
    state = replace(state, pool=pool)
    # Of a chunk's tokens, the last ones alone are followed by tokens that are to be made.
    behind = told["starts"][drawn_row + 1] - places_drawn
    live = (told["sample"] >= 0) & (behind <= told["left"][drawn_row])
    at = position[places_drawn] + 1
    state, first = draw(state, x[places_drawn], at, live)
    prompt = None
    if not layout.plain:
        prompt = _prompt(params, config, x, told["after"], told["switches"], axis)
    if layout.steps == 1:
        return state, Out(jax.tree.map(lambda a: a[None], first), prompt, guesses)

    def more(i: Array, carry: tuple) -> tuple:
        state, made = carry
        live = real & (i < told["left"][row])  # here place i is token i, of row i
        tokens = jnp.where(real, made.tokens[i - 1], 0)
        lengths = told["length"] + i
        x, pool = forward(state.pool, tokens, position + i, lengths, live)
        state, drawn = draw(replace(state, pool=pool), x, at + i, live)
        return state, jax.tree.map(lambda all, new: all.at[i].set(new), made, drawn)

    made = jax.tree.map(lambda a: jnp.zeros((layout.steps, *a.shape), a.dtype).at[0].set(a), first)
    state, made = jax.lax.fori_loop(1, layout.steps, more, (state, made))
    return state, Out(made, prompt)


_DRAWS = (
    "key_0", "key_1", "temperature", "top_k", "top_p", "min_p", "repetition", "presence",
    "frequency", "seeded",
)  # fmt: skip
_SCORED = 16  # tokens whose logits are in memory at once


def _logits(params: kv.DecodeParams, config: ModelConfig, x: Array, axis: str | None) -> Array:
    """Logits [S, V] of x [S, D]."""
    logits = kv.head(params, config, x[None])[0]
    return logits if axis is None else jax.lax.all_gather(logits, axis, axis=1, tiled=True)


def _prompt(
    params: kv.DecodeParams, config: ModelConfig, x: Array, after: Array, switches: Array,
    axis: str | None,
) -> Drawn:  # fmt: skip
    """How likely the token `after` each of T was, and the likeliest ones there."""
    T = after.shape[0]
    part = min(T, _SCORED)
    x, after = jnp.pad(x, ((0, -T % part), (0, 0))), jnp.pad(after, (0, -T % part))

    def score(_: Any) -> Drawn:
        def some(start: Array) -> Drawn:
            h = jax.lax.dynamic_slice_in_dim(x, start, part)
            want = jax.lax.dynamic_slice_in_dim(after, start, part)
            logps = jax.nn.log_softmax(_logits(params, config, h, axis))
            found = jnp.take_along_axis(logps, want[:, None], axis=1)[:, 0]
            return Drawn(want, found, *likeliest_of(logps, switches[3] > 1))

        parts = jax.lax.map(some, jnp.arange(0, T, part))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:T], parts)

    shapes = jax.eval_shape(score, 0)
    return jax.lax.cond(
        switches[3] > 0, score,
        lambda _: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), 0,
    )  # fmt: skip


def admit(
    state: State,
    slot: Int[Array, ""],
    history: Int[Array, " n"],
    prompt: Int[Array, ""],
    length: Int[Array, ""],
    ids: Int[Array, " m"],
    values: Float[Array, " m"],
    others: Float[Array, ""],
    more: Bool[Array, ""],
) -> State:
    """`state` with a sequence in `slot`: its tokens counted, its bias written.

    history: its tokens, the first `prompt` of `length` are the prompt's. bias: values at ids
    (below zero for none), `others` (0 or -inf) elsewhere; with `more`, what is written stays.
    """
    V = state.counts.shape[1]
    place = jnp.arange(history.shape[0])
    in_prompt = jnp.where(place < prompt, history, V)
    made = jnp.where((place >= prompt) & (place < length), history, V)
    counts = jnp.zeros((V,), jnp.int32).at[in_prompt].set(SEEN, mode="drop")
    counts = counts.at[made].add(1, mode="drop")
    bias = (
        jnp.where(more, state.bias[slot], others)
        .at[jnp.where(ids < 0, V, ids)]
        .set(values, mode="drop")
    )
    return replace(state, counts=state.counts.at[slot].set(counts),
                         bias=state.bias.at[slot].set(bias))  # fmt: skip
