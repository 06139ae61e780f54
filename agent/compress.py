"""Short-term memory with a budget: a conversation that grew too long is made shorter, in the open.

    Agent(..., compression=Compression(budget=6000, strategies=("trim", "summarise")))

Strategies are tried in order until the conversation fits `keep` of its budget, so that many turns
pass before the next time: each compression makes the model read again all that follows the first
change. What comes before it stays, token for token. The journal keeps everything; `Compressed` says
what it cost and what the model no longer sees.

- "trim": old results of tools become one line each; the text of the conversation stays.
- "drop": the oldest turns go; the user's first message stays.
- "summarise": the oldest turns become a summary by the model.
- "hierarchical": the same in chunks, the older half of the summaries again in one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agent.events import Compressed
from agent.messages import Message, same_start, user
from agent.model import Model, Request, Settings, Usage, complete

Said = Sequence[Message]
Strategy = Literal["trim", "drop", "summarise", "hierarchical"]
_SUMMARY = "What was said before, in short:\n"
_ASK = (
    "Write down in at most 150 words what must not be forgotten of this conversation: facts, "
    "names, numbers, decisions, what is still to be done. Write nothing else.\n\n"
)
_CHUNK = 8  # turns that one summary of "hierarchical" covers


def estimate(messages: Said) -> int:
    """About how many tokens the messages are: a quarter of their characters, and a few each."""
    size = sum(len(m.content) + sum(len(c.arguments) + 20 for c in m.calls) for m in messages)
    return size // 4 + 4 * len(messages)


@dataclass(frozen=True)
class Compression:
    """When and how: beyond `budget` tokens, by `strategies` in order, down to the share `keep`.
    The `recent` last turns are never touched."""

    budget: int
    strategies: tuple[Strategy, ...] = ("trim", "summarise")
    keep: float = 0.5
    recent: int = 4
    count: Callable[[Said], int] = estimate


async def compress(messages: Said, how: Compression, model: Model) -> Compressed | None:
    """The conversation within its budget, or None where it fits already or nothing can go. Calls
    and their results stay together."""
    before = how.count(messages)
    if before <= how.budget:
        return None
    target, now, lost, used = int(how.budget * how.keep), tuple(messages), [], []
    usage = Usage()
    for strategy in how.strategies:
        if how.count(now) <= target:
            break
        made, told, spent = await _STRATEGIES[strategy](now, how, target, model)
        if how.count(made) < how.count(now):
            now, used, lost = made, [*used, strategy], [*lost, told]
            usage = usage + spent
    if not used:
        return None
    after, prefix = how.count(now), how.count(now[: same_start(messages, now)])
    return Compressed(now, tuple(used), before, after, prefix, "; ".join(lost), usage)


def turns(messages: Said) -> list[tuple[Message, ...]]:
    """The conversation in pieces that may be taken away whole: a message with its results."""
    found: list[tuple[Message, ...]] = []
    for message in messages:
        if message.role == "tool" and found:
            found[-1] = (*found[-1], message)
        else:
            found.append((message,))
    return found


def _joined(pieces: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    return tuple(message for piece in pieces for message in piece)


async def _trim(messages: Said, how: Compression, target: int, model: Model) -> Any:
    pieces, gone = turns(messages), 0
    for i, piece in enumerate(pieces[: len(pieces) - how.recent]):
        if how.count(_joined(pieces)) <= target:
            break
        shorter = tuple(
            replace(m, content=f"[{len(m.content):,} characters, no longer shown]")
            if m.role == "tool" and len(m.content) > 60 else m
            for m in piece
        )  # fmt: skip
        gone += sum(a != b for a, b in zip(piece, shorter, strict=True))
        pieces[i] = shorter
    return _joined(pieces), f"the text of {gone} results", Usage()


async def _drop(messages: Said, how: Compression, target: int, model: Model) -> Any:
    pieces, gone = turns(messages), 0
    while len(pieces) > 1 + how.recent and how.count(_joined(pieces)) > target:
        del pieces[1]
        gone += 1
    return _joined(pieces), f"{gone} turns", Usage()


async def _summed_up(
    messages: Said, how: Compression, target: int, model: Model, chunk: int = 1 << 30
) -> Any:
    """The old turns as a summary for each `chunk` of them, the older half of many in one."""
    pieces = turns(messages)
    old = pieces[1 : max(1, len(pieces) - how.recent)]
    summaries, usage = list[str](), Usage()
    for i in range(0, len(old), chunk):
        text, spent = await _summary(old[i : i + chunk], model)
        summaries, usage = [*summaries, text], usage + spent
    if len(summaries) > 2:
        half = len(summaries) // 2
        text, spent = await _summary([(user(s),) for s in summaries[:half]], model)
        summaries, usage = [text, *summaries[half:]], usage + spent
    shown = (user(_SUMMARY + text) for text in summaries)
    kept = (*pieces[0], *shown, *_joined(pieces[1 + len(old) :]))
    return kept, f"the wording of {len(old)} turns", usage


async def _summary(pieces: Sequence[tuple[Message, ...]], model: Model) -> tuple[str, Usage]:
    written = "\n".join(
        f"{m.role}: {m.content}" + "".join(f" [{c.name} {c.arguments}]" for c in m.calls)
        for m in _joined(pieces)
    )
    request = Request((user(_ASK + written),), settings=Settings(max_tokens=300))
    end = await complete(model, request)
    return end.message.content, end.usage


_STRATEGIES: dict[str, Callable[..., Any]] = {
    "trim": _trim, "drop": _drop, "summarise": _summed_up,
    "hierarchical": functools.partial(_summed_up, chunk=_CHUNK),
}  # fmt: skip
