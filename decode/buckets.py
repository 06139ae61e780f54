"""The few shapes a step may have: each is one compiled program, and padding is what they cost.

Imports no jax.
"""

from __future__ import annotations

from dataclasses import replace

from decode.packing import Layout


def doubling(first: int, last: int, factor: int = 2) -> list[int]:
    """first, first * factor, ... and `last`, which is the largest."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]


def layouts(
    *, max_running: int, budget: int, pages: int, steps: int, drafts: int, reads_dead_pages: bool,
    plain: bool = False, by_model: bool = False, reads: bool = False,
) -> list[Layout]:  # fmt: skip
    """Every shape, the one first with which an engine can begin to serve whatever comes.

    Args:
      max_running: sequences that run at once.
      budget: tokens a step.
      pages: that one sequence may have.
      steps: tokens a row in one call.
      drafts: tokens guessed a row.
      reads_dead_pages: whether a lone token costs as much as its row may have pages, so that
        programs for fewer pages are worth their compilation.
      by_model, reads: whether a model drafts, and must read what it has not computed.
      plain: whether wishes that no row has cost so much that every shape has a program without.
    """
    few = [max_running] if max_running < 8 else doubling(1, max_running, 4)
    if max_running >= 64:  # half a batch is worth a program of its own
        few = sorted({*few, max_running // 2})
    tables = doubling(16, pages, 4) if reads_dead_pages and pages > 16 else [pages]
    least = min(max(64, 2 * max_running), budget)
    mixed = [Layout(T, max_running, pages, max_running) for T in doubling(least, budget, 4)]
    decode = [Layout(B, B, M, B) for B in few for M in tables]
    if steps > 1:
        decode += [Layout(B, B, M, B, steps) for B in few for M in tables]
    verify = []
    if drafts:
        sizes = doubling(1 + drafts, max_running * (1 + drafts), 4)
        made = drafts if by_model else 0
        verify = [Layout(T, max(1, T // (1 + drafts)), pages, T, drafts=made) for T in sizes]
    shapes = [*decode, *verify, *mixed[1:]]
    without = [replace(one, plain=True) for one in (*mixed[:1], *shapes) if plain]
    reading = [replace(one, S=0) for one in mixed if reads]
    return list(dict.fromkeys([*mixed[:1], *without, *shapes, *reading]))


def smallest(
    ready: list[Layout], *, tokens: int, rows: int, pages: int, steps: int, everywhere: bool,
    plain: bool, drafts: int = 0, reads: bool = False,
) -> Layout | None:  # fmt: skip
    """The one that computes least among those that hold such a step.

    everywhere: tokens are drawn at drafts too. plain: no row has a wish. drafts, reads: of Layout.
    """
    fits = [
        one for one in ready
        if tokens <= one.T and rows <= one.B and pages <= one.M and steps == one.steps
        and everywhere <= one.everywhere and one.plain <= plain
        and drafts == one.drafts and reads == one.reads
    ]  # fmt: skip
    return min(fits, key=lambda one: (one.T, one.M, one.S, not one.plain), default=None)
