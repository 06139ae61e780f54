"""How much a run may use. Each limit ends the run with what it has, never with an exception."""

from __future__ import annotations

from dataclasses import dataclass

from agent.state import Spent


@dataclass(frozen=True)
class Limits:
    """Bounds of one run; None is none.

    turns of the model, calls of tools, tokens read and written, cost in the model's unit, seconds
    that a process spends on it. `output_retries` is how often a wrong final answer goes back.
    Seconds also end a turn or a tool in its middle; tokens cap what each turn may write.
    """

    turns: int | None = 20
    tool_calls: int | None = 50
    tokens: int | None = None
    cost: float | None = None
    seconds: float | None = None
    output_retries: int = 2

    def reached(self, spent: Spent) -> str | None:
        """Which limit keeps the model from another turn, as a sentence, or None."""
        for name in ("turns", "tool_calls", "tokens", "cost", "seconds"):
            bound, used = getattr(self, name), getattr(spent, name)
            if bound is None or used < bound:
                continue
            if name == "tool_calls" and used == bound:
                continue  # the model may still answer from what its last call found
            return f"{name}: {used:g} of {bound:g} used"
        return None

    def tokens_left(self, spent: Spent, wanted: int | None) -> int | None:
        """How many tokens the next turn may write."""
        if self.tokens is None:
            return wanted
        left = max(1, self.tokens - spent.tokens)
        return left if wanted is None else min(left, wanted)
