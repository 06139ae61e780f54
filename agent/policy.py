"""Which calls run, which wait for a person, which never run: rules, and taint.

Decisions are made from the tool, its arguments and where the conversation's words came from, never
by asking a model. Once a tool whose results a stranger may have written has been read, every
privileged call (one with effects, or that can send data away) needs a person, whatever the model
was talked into.
"""

from __future__ import annotations

import fnmatch
import inspect
import posixpath
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.tools import Tool, as_text

Action = Literal["allow", "ask", "deny"]


@dataclass(frozen=True)
class Rule:
    """`action` for the tools whose name matches the glob `tool` and whose arguments match all the
    globs of `where` (an argument that is not text is matched as its JSON, a path with its ".."
    worked out)."""

    tool: str
    action: Action
    where: Mapping[str, str] = field(default_factory=dict)

    def matches(self, tool: Tool, arguments: Mapping[str, Any]) -> bool:
        return fnmatch.fnmatchcase(tool.name, self.tool) and all(
            name in arguments and _matches(as_text(arguments[name]), pattern)
            for name, pattern in self.where.items()
        )


def _matches(text: str, pattern: str) -> bool:
    # "/data/../etc/passwd" is not below /data, whether the rule allows or denies.
    whole = posixpath.normpath(text) if "/" in pattern and "://" not in pattern else text
    return fnmatch.fnmatchcase(whole, pattern)


@dataclass(frozen=True)
class Policy:
    """The first rule that matches decides, else the tool's own `approval`; `tainted` is what a
    privileged call becomes after untrusted results, unless a rule already denied it."""

    rules: tuple[Rule, ...] = ()
    tainted: Action = "ask"


@dataclass(frozen=True)
class Decision:
    """What becomes of a call, the reason that a person and the journal are told, and the kind of
    error that a call has which does not run."""

    action: Action
    reason: str = ""
    kind: str = "denied"


def decide(
    policy: Policy, tool: Tool, arguments: Mapping[str, Any], tainted_by: tuple[str, ...]
) -> Decision:
    """What becomes of one call of `tool` in a conversation tainted by these tools."""
    decision = Decision("allow")
    rule = next((r for r in policy.rules if r.matches(tool, arguments)), None)
    if rule is not None:
        decision = Decision(rule.action, f"rule {rule.tool}: {rule.action}")
    elif tool.approval(dict(arguments)) if callable(tool.approval) else tool.approval:
        decision = Decision("ask", f"{tool.name} always asks")
    if tainted_by and tool.privileged and policy.tainted != "allow" and decision.action != "deny":
        reason = f"{tool.name} is privileged and the conversation holds what a stranger may have "
        return Decision(policy.tainted, reason + f"written (from {', '.join(tainted_by)})")
    return decision


@dataclass(frozen=True)
class Guardrail:
    """A check of text at one place: it returns why the text must not pass, or None.

    "input": what the user says, before any model reads it. "call": a tool's name and arguments,
    as "name {json}". "result": a tool's result. "output": the final answer. At input and output a
    tripped guardrail ends the run; at the others the model is told. A raising check has
    tripped.
    """

    name: str
    stage: Literal["input", "call", "result", "output"]
    check: Callable[[str], str | Awaitable[str | None] | None]


async def tripped(guardrails: tuple[Guardrail, ...], stage: str, text: str) -> str | None:
    """The name and reason of the first guardrail of this stage that trips, or None."""
    for guardrail in guardrails:
        if guardrail.stage != stage:
            continue
        try:
            reason = guardrail.check(text)
            if inspect.isawaitable(reason):
                reason = await reason
        except Exception as error:
            reason = f"the check failed ({type(error).__name__}: {error})"
        if reason:
            return f"{guardrail.name}: {reason}"
    return None
