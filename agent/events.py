"""What happens in a session, as a closed union of frozen events.

The journal holds the events of `Recorded`; a conversation's messages, its cost, its spans and what
there is to do next are folds over them and stored nowhere else. Deltas and tool progress pass by in
a stream and are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, TypeAdapter

from agent.messages import Message, ToolCall
from agent.model import CallDelta, ReasoningDelta, TextDelta, Usage

Reason = Literal["done", "limit", "cancelled", "guardrail", "error"]


@dataclass(frozen=True)
class RunStarted:
    """A user's turn begins; `instructions` are fixed here so that the prefix never shifts.
    `tainted_by` is what a caller that was tainted passes on."""

    agent: str
    instructions: str
    messages: tuple[Message, ...]
    tainted_by: tuple[str, ...] = ()
    type: Literal["run_started"] = "run_started"


@dataclass(frozen=True)
class Resumed:
    """Another driver took the session over; the time before this event is not counted."""

    type: Literal["resumed"] = "resumed"


@dataclass(frozen=True)
class Retried:
    """A layer (transport, tool) failed and goes again; text streamed for it so far is void."""

    layer: Literal["transport", "tool"]
    attempt: int
    error: str
    type: Literal["retried"] = "retried"


@dataclass(frozen=True)
class ModelResponded:
    """A turn of the model, whole or cut (`finish` "cut": a limit or a cancellation ended it)."""

    model: str
    message: Message
    usage: Usage
    finish: Literal["stop", "calls", "length", "filter", "cut"]
    seconds: float
    type: Literal["model_responded"] = "model_responded"


@dataclass(frozen=True)
class OutputRejected:
    """The final answer failed its check. `feedback` goes back to the model as a message, unless it
    was told as the result of the call `call_id`."""

    feedback: str
    call_id: str | None = None
    type: Literal["output_rejected"] = "output_rejected"


@dataclass(frozen=True)
class ToolStarted:
    """Written before a tool runs, or with its end if it is pure. `key` is the same for every
    attempt at this call."""

    call_id: str
    name: str
    key: str
    type: Literal["tool_started"] = "tool_started"


@dataclass(frozen=True)
class ToolFinished:
    """What the model is told about a call. `error` names a kind; None is success. `tainted` means
    that a stranger may have written the content."""

    call_id: str
    content: str
    error: str | None = None
    tainted: bool = False
    seconds: float = 0.0
    type: Literal["tool_finished"] = "tool_finished"


@dataclass(frozen=True)
class ApprovalRequested:
    """A call waits for a person; `reason` says which rule asks."""

    call: ToolCall
    reason: str
    type: Literal["approval_requested"] = "approval_requested"


@dataclass(frozen=True)
class ApprovalDecided:
    """A person's answer; `note` is told to the model where the answer is no."""

    call_id: str
    approved: bool
    note: str = ""
    type: Literal["approval_decided"] = "approval_decided"


@dataclass(frozen=True)
class HandedOff:
    """From here on another agent answers, with its own instructions and tools."""

    agent: str
    instructions: str
    type: Literal["handed_off"] = "handed_off"


@dataclass(frozen=True)
class Compressed:
    """The conversation became `messages`, from about `before` tokens to `after`; `prefix` of them
    are unchanged. `lost` says what the model no longer sees, `usage` what summing up took."""

    messages: tuple[Message, ...]
    strategies: tuple[str, ...]
    before: int
    after: int
    prefix: int
    lost: str
    usage: Usage = field(default_factory=Usage)
    type: Literal["compressed"] = "compressed"


@dataclass(frozen=True)
class Forked:
    """What precedes was copied from `parent`, whose first `at` events it is."""

    parent: str
    at: int
    type: Literal["forked"] = "forked"


@dataclass(frozen=True)
class GraphStarted:
    """A graph of nodes begins, with this state."""

    state: dict[str, Any]
    type: Literal["graph_started"] = "graph_started"


@dataclass(frozen=True)
class NodeWrote:
    """A node of a graph ended in superstep `step`, and wrote this by channel."""

    step: int
    node: str
    writes: dict[str, Any]
    type: Literal["node_wrote"] = "node_wrote"


@dataclass(frozen=True)
class GraphAnswered:
    """A person's answer to the question of a graph's node."""

    node: str
    answer: Any
    type: Literal["graph_answered"] = "graph_answered"


@dataclass(frozen=True)
class RunFinished:
    """The end of a user's turn; `output` is text, or JSON values of the output type."""

    reason: Reason
    output: Any = None
    detail: str = ""
    type: Literal["run_finished"] = "run_finished"


@dataclass(frozen=True)
class ToolProgress:
    """What a generator tool yielded, or a tool reported, before its end."""

    call_id: str
    text: str
    type: Literal["tool_progress"] = "tool_progress"


Kept = (
    RunStarted | Resumed | Retried | ModelResponded | OutputRejected | ToolStarted | ToolFinished
    | ApprovalRequested | ApprovalDecided | HandedOff | Compressed | Forked | GraphStarted
    | NodeWrote | GraphAnswered | RunFinished
)  # fmt: skip
Passing = TextDelta | ReasoningDelta | CallDelta | ToolProgress
Event = Kept | Passing

_KEPT: TypeAdapter[Kept] = TypeAdapter(Annotated[Kept, Discriminator("type")])


@dataclass(frozen=True)
class Recorded:
    """An event with its place in its session (from 1) and its time (seconds since 1970)."""

    seq: int
    time: float
    event: Kept


def dump(event: Kept) -> str:
    return _KEPT.dump_json(event).decode()


def load(line: str | bytes) -> Kept:
    """The event of `dump`; raises pydantic's ValidationError on anything else."""
    return _KEPT.validate_json(line)
