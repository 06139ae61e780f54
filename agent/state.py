"""Where a session stands: a pure fold over its events.

The loop decides its next step from this value alone. That is why resuming is no special case: a
process that died left a journal, its fold is the same state, and the same next step follows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent import events as ev
from agent.messages import Message, ToolCall, user
from agent.model import Usage


@dataclass(frozen=True)
class Spent:
    """What the current run has used; `seconds` is time in which some process drove it."""

    turns: int = 0
    tool_calls: int = 0
    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class State:
    """The fold of a session's events.

    `started` maps the calls of this turn that some process began to their keys, `results` those
    that ended to what the model is told. `asked` are calls that wait for a person, `decided` the
    answers. `finish` is how the last turn ended. `tainted_by` names the
    tools whose results a stranger may have written.
    """

    seq: int = 0
    time: float = 0.0
    agent: str = ""
    instructions: str = ""
    messages: tuple[Message, ...] = ()
    started: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, ev.ToolFinished] = field(default_factory=dict)
    asked: Mapping[str, ev.ApprovalRequested] = field(default_factory=dict)
    decided: Mapping[str, ev.ApprovalDecided] = field(default_factory=dict)
    tainted_by: tuple[str, ...] = ()
    finish: str = ""
    rejected: int = 0
    runs: int = 0
    spent: Spent = field(default_factory=Spent)
    finished: ev.RunFinished | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All that the model reads in its next turn."""
        system = (Message("system", self.instructions),) if self.instructions else ()
        return (*system, *self.messages)

    @property
    def pending(self) -> tuple[ToolCall, ...]:
        """The calls of the last turn that have no result yet, in the model's order."""
        last = self.messages[-1] if self.messages else None
        calls = last.calls if last is not None else ()
        return tuple(call for call in calls if call.id not in self.results)

    @property
    def waiting(self) -> tuple[ev.ApprovalRequested, ...]:
        """The approvals that nobody has given or refused yet."""
        return tuple(r for id, r in self.asked.items() if id not in self.decided)


def evolve(state: State, recorded: ev.Recorded) -> State:
    event, spent = recorded.event, state.spent
    unwatched = isinstance(event, ev.Resumed | ev.RunStarted | ev.ApprovalDecided | ev.Forked)
    if state.time and not unwatched and recorded.time > state.time:
        spent = replace(spent, seconds=spent.seconds + recorded.time - state.time)
    changes: dict[str, Any] = {"seq": recorded.seq, "time": recorded.time, "spent": spent}
    return replace(state, **changes | _changes(state, event, spent))


def _changes(state: State, event: ev.Kept, spent: Spent) -> dict[str, Any]:
    match event:
        case ev.RunStarted():
            tainted_by = tuple(dict.fromkeys((*state.tainted_by, *event.tainted_by)))
            return {
                "agent": event.agent, "instructions": event.instructions,
                "messages": state.messages + event.messages, "rejected": 0,
                "runs": state.runs + 1, "tainted_by": tainted_by, "spent": Spent(),
                "finished": None, "asked": {}, "decided": {},
            }  # fmt: skip
        case ev.ModelResponded():
            used = replace(_paid(spent, event.usage), turns=spent.turns + 1)
            messages = (*state.messages, event.message)
            return {"messages": messages, "spent": used, "started": {}, "results": {},
                    "finish": event.finish}  # fmt: skip
        case ev.OutputRejected():
            feedback = () if event.call_id else (user(event.feedback),)
            return {"messages": state.messages + feedback, "rejected": state.rejected + 1}
        case ev.ToolStarted():
            if event.call_id not in state.started:
                spent = replace(spent, tool_calls=spent.tool_calls + 1)
            return {"started": {**state.started, event.call_id: event.key}, "spent": spent}
        case ev.ToolFinished():
            return _finish_call(state, event)
        case ev.ApprovalRequested():
            return {"asked": {**state.asked, event.call.id: event}}
        case ev.ApprovalDecided():
            return {"decided": {**state.decided, event.call_id: event}}
        case ev.HandedOff():
            return {"agent": event.agent, "instructions": event.instructions}
        case ev.Resumed() if state.finished is not None and state.finished.reason != "done":
            # What a limit or a cancellation cut in the middle is void: the turn is taken again.
            kept = state.messages[:-1] if state.finish == "cut" else state.messages
            return {"messages": kept, "finish": "", "finished": None}
        case ev.Compressed():
            return {"messages": event.messages, "spent": _paid(spent, event.usage)}
        case ev.Forked():
            return {"spent": Spent()}
        case ev.RunFinished():
            return {"finished": event}
        case _:
            return {}


def _paid(spent: Spent, usage: Usage) -> Spent:
    tokens = spent.tokens + usage.input + usage.output
    return replace(spent, tokens=tokens, cost=spent.cost + usage.cost)


def _finish_call(state: State, event: ev.ToolFinished) -> dict[str, Any]:
    results = {**state.results, event.call_id: event}
    calls = state.messages[-1].calls
    made: dict[str, Any] = {"results": results}
    if event.tainted:
        name = next(call.name for call in calls if call.id == event.call_id)
        made["tainted_by"] = tuple(dict.fromkeys((*state.tainted_by, name)))
    if all(call.id in results for call in calls):
        # Calls end in any order; the conversation has theirs: a replay has the same prefix.
        made["messages"] = state.messages + tuple(
            Message("tool", results[call.id].content, call_id=call.id) for call in calls
        )
    return made


def fold(events: Iterable[ev.Recorded]) -> State:
    return functools.reduce(evolve, events, State())
