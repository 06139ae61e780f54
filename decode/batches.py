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
    rows: list[tuple[int, ...]] = []
    tokens: list[int] = []
    starts, switches = [0], [0] * 4
    for i, chunk in enumerate(plan.chunks):
        sequence, params = chunk.sequence, chunk.sequence.request.params
        new = sequence.tokens[chunk.start : chunk.end]
        if new[-1] == PENDING:
            new = [-1 - sequence.slot]
        if params.prompt_logprobs is not None:
            at, prompt = len(tokens), sequence.request.prompt
            after = prompt[chunk.start + 1 : chunk.end + 1]
            view["after"][at : at + len(after)] = after
            if chunk.start < len(prompt):
                switches[3] = max(switches[3], 2 if params.prompt_logprobs else 1)
        if layout.drafts:
            view["before"][i] = sequence.tokens[max(chunk.start - 1, 0)]
        tokens += [*new, *chunk.drafts]
        starts.append(len(tokens))
        if not params.plain:
            switches[0] |= params.penalised
            switches[1] |= params.truncated
            switches[2] |= bool(params.logprobs)
        length = chunk.end + len(chunk.drafts)
        rows.append((sequence.slot, length, chunk.makes, *_constants(sequence, keys)))
        pages = sequence.table.pages
        view["table"][i, : len(pages)] = pages
    at, B = len(tokens), len(rows)
    view["tokens"][:at] = tokens
    view["rows"].view(np.int32).reshape(layout.B, -1)[:B] = rows
    view["starts"][: B + 1], view["starts"][B + 1 :] = starts, at
    view["switches"][:] = switches
    if layout.S and not layout.everywhere:
        view["sample"][:B] = view["starts"][1 : B + 1] - 1
    if layout.everywhere:
        view["sample"][:at] = np.arange(at)
    return packed


def _constants(sequence: Sequence, keys: Mapping[Sequence, tuple[int, int]]) -> tuple[int, ...]:
    """What of a sequence's row is the same in every step; floats as their bits."""
    if not sequence.constants:
        params = sequence.request.params
        floats = np.array([
            params.temperature, params.top_p, params.min_p, params.repetition_penalty,
            params.presence_penalty, params.frequency_penalty,
        ], np.float32)  # fmt: skip
        sequence.constants = (
            params.top_k, *keys[sequence], int(params.seed is not None),
            *floats.view(np.int32).tolist(),
        )  # fmt: skip
    return sequence.constants


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
