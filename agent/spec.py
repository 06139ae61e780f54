"""What an agent is: a model with a task, tools, colleagues, bounds and policies. Only data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, create_model
from pydantic.errors import PydanticUserError

from agent.compress import Compression
from agent.limits import Limits
from agent.model import Model, Settings, ToolSpec
from agent.policy import Guardrail, Policy
from agent.tools import Tool, as_text
from jaxinfra.errors import UserError

FINAL = "final_result"  # the tool through which an agent with tools gives a structured answer


@dataclass(frozen=True)
class Agent:
    """A model with a task: instructions, tools, whom it may hand over to, and its bounds.

    `instructions` may be a function of the run's deps; it is asked once a run. `output_type` is any
    type pydantic can check; other than str, the final answer is forced into it.
    """

    name: str
    model: Model
    instructions: str | Callable[[Any], str] = ""
    tools: tuple[Tool, ...] = ()
    handoffs: tuple[Agent, ...] = ()
    output_type: Any = str
    description: str = ""
    settings: Settings = field(default_factory=Settings)
    limits: Limits = field(default_factory=Limits)
    guardrails: tuple[Guardrail, ...] = ()
    policy: Policy = field(default_factory=Policy)
    compression: Compression | None = None
    transport_retries: int = 3

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools] + [transfer_name(a) for a in self.handoffs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or FINAL in names:
            raise UserError(f"agent {self.name}: two tools named {(twice or [FINAL])[0]!r}")
        try:
            _ = self.schema
        except PydanticUserError as error:
            raise UserError(
                f"agent {self.name}: output_type {self.output_type!r} has no JSON schema: "
                f"{str(error).splitlines()[0]}"
            ) from None

    @functools.cached_property
    def output(self) -> TypeAdapter[Any]:
        """What checks the final answer."""
        return TypeAdapter(self.output_type)

    @functools.cached_property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of a structured answer; None for text."""
        return None if self.output_type is str else self.output.json_schema()

    @functools.cached_property
    def final(self) -> Tool:
        """The tool whose one argument is the structured answer."""
        config = ConfigDict(extra="forbid")
        answer = create_model(FINAL, __config__=config, answer=(self.output_type, ...))
        return Tool(FINAL, "Gives the final answer and ends the task.", as_text, answer)

    @functools.cached_property
    def specs(self) -> tuple[ToolSpec, ...]:
        """All that its model may call."""
        specs = [tool.spec for tool in self.tools]
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        for other in self.handoffs:
            specs.append(ToolSpec(transfer_name(other), f"Hand over: {other.description}", nothing))
        if specs and self.schema is not None:
            specs.append(self.final.spec)
        return tuple(specs)


def transfer_name(agent: Agent) -> str:
    return f"transfer_to_{agent.name}"


def reachable(agent: Agent) -> dict[str, Agent]:
    """The agent and all whom it may hand over to, directly or not, by name."""
    found: dict[str, Agent] = {}
    todo = [agent]
    while todo:
        one = todo.pop()
        if found.setdefault(one.name, one) is not one:
            raise UserError(f"two agents are named {one.name!r}; handoffs go by name")
        todo += [other for other in one.handoffs if found.get(other.name) is not other]
    return found
