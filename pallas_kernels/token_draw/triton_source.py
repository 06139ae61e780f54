"""A token from each row of logits as a Triton kernel: the source, for JAX and the interpreter.

Arrays are contiguous: logits [S, V], temperature, uniform, logps [S], tops, sums [S, BLOCKS]
float32; tokens [S], bests [S, BLOCKS], counters [S] int32, zeros before and after. A program goes
through BLOCK logits of a row; the last of a row to come looks at what all have found and then once
more into the block in which the draw falls.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def _scaled(logits_ptr, row, block, warmth, V: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row's logits over its temperature; -inf past the row."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + tl.cast(row, tl.int64) * V + token
    return tl.load(at, mask=token < V, other=float("-inf")) / warmth


@triton.jit
def draw(
    counters_in, logits_ptr, temperature_ptr, uniform_ptr,
    counters_ptr, tokens_ptr, logps_ptr, tops_ptr, sums_ptr, bests_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """tokens[row] and its log-probability; `counters_in` are `counters`."""
    row, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0
    warmth = tl.where(greedy, 1.0, tl.maximum(temperature, 1e-5))
    x = _scaled(logits_ptr, row, block, warmth, V, BLOCK)
    top, best = tl.max(x, 0, return_indices=True)
    mine = row * BLOCKS + block
    tl.store(tops_ptr + mine, top)
    tl.store(sums_ptr + mine, tl.sum(tl.where(x > float("-inf"), tl.exp(x - top), 0.0), 0))
    tl.store(bests_ptr + mine, block * BLOCK + best)
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + row, 1, sem="acq_rel") == BLOCKS - 1:
        tl.debug_barrier()
        tl.store(counters_ptr + row, 0)
        each = tl.arange(0, WIDE)
        at, live = row * BLOCKS + each, each < BLOCKS
        tops = tl.load(tops_ptr + at, mask=live, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(sums_ptr + at, mask=live, other=0.0, cache_modifier=".cg")
        highest, winner = tl.max(tops, 0, return_indices=True)
        weights = tl.where(sums > 0, sums * tl.exp(tops - highest), 0.0)
        total = tl.sum(weights, 0)
        target = tl.load(uniform_ptr + row) * total
        passed = tl.cumsum(weights, 0)
        chosen = tl.sum((passed <= target).to(tl.int32), 0)
        last = tl.max(tl.where(weights > 0, each, 0), 0)
        chosen = tl.minimum(chosen, last)
        before = tl.sum(tl.where(each < chosen, weights, 0.0), 0)
        y = _scaled(logits_ptr, row, chosen, warmth, V, BLOCK)
        within = tl.exp(y - highest)
        inside = tl.arange(0, BLOCK)
        passed = (tl.cumsum(within, 0) + before > target) & (within > 0)
        place = tl.min(tl.where(passed, inside, BLOCK), 0)
        last = tl.max(tl.where(within > 0, inside, 0), 0)
        drawn = chosen * BLOCK + tl.minimum(place, last)
        best = tl.load(bests_ptr + row * BLOCKS + winner, cache_modifier=".cg")
        token = tl.minimum(tl.where(greedy, best, drawn), V - 1)
        tl.store(tokens_ptr + row, token)
        logit = tl.load(logits_ptr + tl.cast(row, tl.int64) * V + token) / warmth
        tl.store(logps_ptr + row, logit - highest - tl.log(total))
