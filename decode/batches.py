"""A plan as the packed array that the device reads. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from decode.packing import Layout
from decode.scheduler import PENDING, Plan, Sequence


def size(plan: Plan, drafts: int = 0) -> dict[str, Any]:
    """What a layout must hold, by the names of `decode.buckets.smallest`.

    drafts: that a model makes a row, if any row has some.
    """
    drafted = any(chunk.drafts for chunk in plan.chunks)
    return {
        "tokens": plan.tokens, "rows": len(plan.chunks), "steps": plan.steps,
        "pages": max(len(chunk.sequence.table.pages) for chunk in plan.chunks),
        "everywhere": drafted, "drafts": drafts * drafted,
        "plain": all(chunk.sequence.plain for chunk in plan.chunks),
    }  # fmt: skip


def pack(plan: Plan, layout: Layout, keys: Mapping[Sequence, tuple[int, int]]) -> np.ndarray:
    """The packed array [layout.size]. keys: of each sequence's draws.

    Where the layout draws at every token, place i is token i; else place i is row i's last token.
    """
    packed, view = layout.empty()
    rows, at = view["rows"], 0
    for i, chunk in enumerate(plan.chunks):
        sequence, params = chunk.sequence, chunk.sequence.request.params
        tokens = sequence.tokens[chunk.start : chunk.end]
        if tokens[-1] == PENDING:
            tokens = [-1 - sequence.slot]
        tokens = [*tokens, *chunk.drafts]
        view["tokens"][at : at + len(tokens)] = tokens
        if params.prompt_logprobs is not None:
            after = sequence.request.prompt[chunk.start + 1 : chunk.end + 1]
            view["after"][at : at + len(after)] = after
        if layout.drafts:
            view["before"][i] = sequence.tokens[max(chunk.start - 1, 0)]
        at += len(tokens)
        view["starts"][i + 1 :] = at
        if layout.S and not layout.everywhere:
            view["sample"][i] = at - 1
        key_0, key_1 = keys[sequence]
        rows[i] = (
            sequence.slot, chunk.end + len(chunk.drafts), chunk.makes, params.top_k, key_0, key_1,
            params.seed is not None, params.temperature, params.top_p, params.min_p,
            params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
        )  # fmt: skip
        pages = sequence.table.pages
        view["table"][i, : len(pages)] = pages
        scored = params.prompt_logprobs
        view["switches"] |= np.asarray([
            params.penalised,
            params.truncated,
            bool(params.logprobs),
            0 if scored is None or chunk.start >= len(sequence.request.prompt)
            else 2 if scored else 1,
        ], np.int32)  # fmt: skip
    if layout.everywhere:
        view["sample"][:at] = np.arange(at)
    return packed


def mask(
    plan: Plan, layout: Layout, words: int, fill: Callable[[Sequence, np.ndarray], None]
) -> np.ndarray | None:
    """What may be drawn at each place [S, words]; None where all may.

    fill: writes the row of a watched sequence, which holds ones before.
    """
    watched = [
        (i, chunk.sequence) for i, chunk in enumerate(plan.chunks)
        if chunk.makes and chunk.sequence.watched
    ]  # fmt: skip
    if not watched:
        return None
    at = np.cumsum([chunk.end - chunk.start + len(chunk.drafts) for chunk in plan.chunks]) - 1
    made = np.full((layout.S, words), -1, np.int32)
    for i, sequence in watched:
        fill(sequence, made[at[i] if layout.everywhere else i])
    return made.view(np.uint32)
