"""Attention over pages in plain XLA: what CPUs run, and what stands in where no kernel does.

On a CPU: a loop over blocks of one row's queries, each a loop over those CHUNK keys at a time that
one of them sees. Live pages alone are read, once a block; a block of q queries costs 4 q N H FLOPs
a key. Rows of one query run in blocks of one, the others in blocks of about T / B.
Elsewhere, where T <= B, as in a decode step: one gather of every token's pages and two products.
Cost: T M page K H keys and values, live or not, but no loop of small launches.

`invariant` takes the loop with blocks of INVARIANT queries at positions a INVARIANT and on: which
place a query has in its block, which chunks it meets, in which order, and the shape of every
product are functions of its position alone. On a CPU its bits then depend neither on other rows,
nor on B or M, nor on how its prompt was chunked. Its cost: small blocks read keys more often, and a
query that stands alone fills one place of eight.

On two cores that others used too (SmolLM2's heads: N=9, K=3, H=64, float32, pages of 16, best of
seven in turns), a decode step of 16 rows of 64 to 512 keys took 2.2 ms, and 5.5 where the loop
gathers its pages. When it still did, in another run with 64 to 1024 keys, `invariant` took 1.4
times the processor time of the loop, and twice for four prompts of 128 queries.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.paged_attention.rows import places

CHUNK = 128  # keys
FEW_PAGES = 16  # of one row, to be taken one by one
LARGEST_BLOCK = 64  # queries
INVARIANT = 8


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P K page H"],
    v_pages: Num[Array, "P K page H"],
    page_table: Int[Array, "B M"],
    starts: Int[Array, " B+1"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    k_scale: Float[Array, "P K page"] | None = None,
    v_scale: Float[Array, "P K page"] | None = None,
    invariant: bool = False,
) -> Float[Array, "T N H"]:
    """The reference's result, with sums in float32."""
    (T, N, H), K = q.shape, k_pages.shape[1]
    if sinks is None:
        sinks = jnp.full((N,), -jnp.inf, jnp.float32)
    sinks = sinks.astype(jnp.float32).reshape(K, N // K)
    call = _Call(_Pages(k_pages, k_scale), _Pages(v_pages, v_scale), scale, window, soft_cap)
    operands = (q.astype(jnp.float32).reshape(T, K, N // K, H), sinks, page_table, starts, lengths)
    if invariant:
        out = by_blocks(call, INVARIANT, *operands)
    elif lengths.shape[0] < T:
        out = by_kinds_of_rows(call, *operands)
    else:
        loop, gather = (functools.partial(f, call) for f in (by_single_queries, by_tokens))
        out = lax.platform_dependent(*operands, cpu=loop, default=gather)
    return out.reshape(T, N, H).astype(q.dtype)


class _Pages:
    """Pages whose heads are gathered one by one, so that a head's keys come out side by side."""

    def __init__(self, pages: Array, scales: Array | None) -> None:
        self.P, self.K, self.size, H = pages.shape
        self._numbers = pages.reshape(self.P * self.K, self.size, H)
        self._scales = None if scales is None else scales.reshape(self.P * self.K, self.size)

    def of(self, table: Int[Array, "*R M"]) -> Float[Array, "*R K S H"]:
        """The pages of a table by heads, S = M page; any number in the table is some page."""
        table = jnp.clip(table, 0, self.P - 1)
        if table.ndim == 1 and table.shape[0] <= FEW_PAGES:
            return self._one_by_one(table)
        index = table[..., None, :] * self.K
        index += jnp.arange(self.K, dtype=jnp.int32)[:, None]
        taken = self._numbers[index].astype(jnp.float32)
        if self._scales is not None:
            taken *= self._scales[index][..., None]
        return taken.reshape(*index.shape[:-1], -1, taken.shape[-1])

    def _one_by_one(self, table: Int[Array, " M"]) -> Float[Array, "K S H"]:
        """By slices: XLA:CPU gathers number by number, which made a step 2.5 times as long."""

        def taken(pages: Array) -> Array:
            return jnp.concatenate(
                [lax.dynamic_slice_in_dim(pages, n * self.K, self.K) for n in table], axis=1
            )

        numbers = taken(self._numbers).astype(jnp.float32)
        return numbers if self._scales is None else numbers * taken(self._scales)[..., None]


@dataclasses.dataclass(frozen=True)
class _Call:
    k: _Pages
    v: _Pages
    scale: float
    window: int | None
    soft_cap: float | None

    def oldest(self, position: Array) -> Array:
        """The first key that a query at `position` sees."""
        return jnp.zeros_like(position) if self.window is None else position - self.window + 1

    def seen(self, position: Int[Array, "*Q"], key: Int[Array, " S"]) -> Bool[Array, "*Q S"]:
        position = position[..., None]
        return (key <= position) & (key >= self.oldest(position))

    def logits(self, products: Array, seen: Array) -> Array:
        logits = products * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        return jnp.where(seen, logits, -jnp.inf)


def by_tokens(call: _Call, q, sinks, page_table, starts, lengths) -> Float[Array, "T K G H"]:
    """Every token beside all pages of its row."""
    row, position = places(starts, lengths, q.shape[0])
    table = page_table[row]
    seen = call.seen(position, jnp.arange(table.shape[1] * call.k.size, dtype=jnp.int32))
    logits = jnp.einsum("tkgh,tksh->tkgs", q, call.k.of(table))
    logits = call.logits(logits, seen[:, None, None])
    top = jnp.maximum(jnp.max(logits, axis=-1), sinks)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, axis=-1) + jnp.exp(sinks - top)
    values = jnp.where(seen[:, None, :, None], call.v.of(table), 0.0)
    out = jnp.einsum("tkgs,tksh->tkgh", weights, values)
    return out / jnp.where(total > 0, total, 1.0)[..., None]


def by_single_queries(call: _Call, q, *operands) -> Float[Array, "T K G H"]:
    """Every query in a block of its own."""
    return by_blocks(call, 1, q, *operands)


def by_kinds_of_rows(call: _Call, q, sinks, page_table, starts, lengths) -> Float[Array, "T K G H"]:
    """Rows of one query in blocks of one, the others in blocks of about T / B."""
    operands = (q, sinks, page_table, starts, lengths)
    single = starts[1:] - starts[:-1] == 1
    out = by_blocks(call, 1, *operands, rows=single)
    block = 1 << ((q.shape[0] - 1) // lengths.shape[0]).bit_length()
    return by_blocks(call, min(block, LARGEST_BLOCK), *operands, rows=~single, out=out)


def by_blocks(
    call: _Call, block: int, q, sinks, page_table, starts, lengths, *, rows=True, out=None
) -> Float[Array, "T K G H"]:
    """Blocks of one row's queries, one after another, beside chunks of that row's keys.

    Of those `rows` alone, into `out`, or zeros.
    """
    T, K, G, H = q.shape
    pages = max(1, CHUNK // call.k.size)
    chunk = pages * call.k.size
    block = math.gcd(block, chunk)  # a block ends in the chunk in which each of its queries ends
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    queries = starts[1:] - starts[:-1]
    after = (lengths - 1) // block + 1  # a row's last block, and its first
    first = (lengths - queries) // block
    ends = jnp.cumsum(jnp.where((queries > 0) & rows, after - first, 0))
    beyond = ((block, block), (0, 0), (0, 0), (0, 0))
    q = jnp.pad(q, beyond)
    out = jnp.zeros_like(q) if out is None else jnp.pad(out, beyond)

    def one_block(i, out):
        row = jnp.sum(ends <= i)
        position = (after[row] - ends[row] + i) * block + jnp.arange(block, dtype=jnp.int32)
        low = lengths[row] - queries[row]
        mine = (position >= low) & (position < lengths[row])
        at = starts[row] - low + position[0] + block  # in arrays with a block before them
        here = lax.dynamic_slice_in_dim(q, at, block)
        here = jnp.moveaxis(here, 0, 2).reshape(K, G * block, H)

        def one_chunk(c, carry):
            acc, top, total = carry
            table = lax.dynamic_slice(page_table, (row, c * pages), (1, pages))[0]
            key = c * chunk + jnp.arange(chunk, dtype=jnp.int32)
            seen = jnp.tile(call.seen(position, key) & mine[:, None], (G, 1))
            logits = call.logits(jnp.einsum("kqh,ksh->kqs", here, call.k.of(table)), seen)
            highest = jnp.maximum(top, jnp.max(logits, axis=-1))
            shift = jnp.where(highest == -jnp.inf, 0.0, highest)
            weights = jnp.exp(logits - shift[..., None])
            shrink = jnp.exp(top - shift)
            values = jnp.where((key < lengths[row])[:, None], call.v.of(table), 0.0)
            added = jnp.einsum("kqs,ksh->kqh", weights, values)
            total = total * shrink + jnp.sum(weights, axis=-1)
            return acc * shrink[..., None] + added, highest, total

        top = jnp.repeat(sinks, block, axis=1)
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
        begin = jnp.maximum(call.oldest(position[0]), 0) // chunk
        end = position[0] // chunk + 1
        carry = (jnp.zeros_like(here), top, total)
        acc, _, total = lax.fori_loop(begin, end, one_chunk, carry)
        made = acc / jnp.where(total > 0, total, 1.0)[..., None]
        made = jnp.moveaxis(made.reshape(K, G, block, H), 2, 0)
        kept = lax.dynamic_slice_in_dim(out, at, block)
        made = jnp.where(mine[:, None, None, None], made, kept)
        return lax.dynamic_update_slice_in_dim(out, made, at, 0)

    return lax.fori_loop(0, ends[-1], one_block, out)[block : block + T]
