"""Sessions as samples for reinforcement learning: what a policy read and wrote, token by token.

    samples = trajectories(await store.read(session), between)

A projection of the journal. A token-exact model keeps the ids that it drew with each of its
messages, so the sample is what was drawn, to the token. Texts that are tokenised again differ from
it (the same text has many tokenisations), and a loss on tokens that nobody drew teaches something
else. `retokenise` does that on purpose, to measure by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.events import ModelResponded, Recorded
from agent.messages import Message, same_start
from agent.state import State, evolve
from jaxinfra.errors import UserError

Between = Callable[[Sequence[Message], bool], Sequence[int]]


@dataclass(frozen=True)
class Trajectory:
    """Token ids in the order in which the model saw them; `mask` is 1 where the model drew the
    token and 0 where it read it."""

    tokens: tuple[int, ...]
    mask: tuple[int, ...]


def trajectories(
    events: Sequence[Recorded], between: Between, *,
    retokenise: Callable[[Message], Sequence[int]] | None = None,
) -> list[Trajectory]:  # fmt: skip
    """The samples of one session: one, or one more wherever the conversation was rewritten
    (compressed, handed over) and the model read all of it again.

    `between(messages, first)` gives the ids of what the model read before a turn: the messages
    since its last one, with all that its template puts around them up to where it begins to
    write; `first` where nothing precedes. `retokenise` encodes a turn of the model from its text
    instead of taking the ids it drew. A turn that was cut is left out, as it is taken again.
    Raises UserError where a turn has no ids: its model was not token-exact, or a secret was in it.
    """
    state, made = State(), []
    read: tuple[Message, ...] = ()
    tokens: list[int] = []
    mask: list[int] = []
    for recorded in events:
        event = recorded.event
        if isinstance(event, ModelResponded) and event.finish != "cut":
            asked = state.prompt
            if asked[: len(read)] != read:
                made.append(Trajectory(tuple(tokens), tuple(mask)))
                read, tokens, mask = (), [], []
            ids = between(asked[len(read) :], not tokens)
            drawn = event.message.tokens if retokenise is None else retokenise(event.message)
            if drawn is None:
                raise UserError(f"trajectories: the turn in event {recorded.seq} has no token ids")
            tokens += [*ids, *drawn]
            mask += [0] * len(ids) + [1] * len(drawn)
            read = (*asked, event.message)
        state = evolve(state, recorded)
    return [*made, Trajectory(tuple(tokens), tuple(mask))] if tokens else made


def drift(exact: Trajectory, other: Trajectory) -> float:
    """The share of `exact` that stands after the first token in which `other` differs."""
    return 1 - same_start(exact.tokens, other.tokens) / len(exact.tokens)
