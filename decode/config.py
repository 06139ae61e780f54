"""What an engine is told when it is made. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from decode.policies import Fair, FirstCome, LeastAttained, Policy, Priority, ShortestRemaining
from jaxinfra.errors import UserError

POLICIES: dict[str, type[Policy]] = {
    "first-come": FirstCome, "priority": Priority, "shortest": ShortestRemaining, "fair": Fair,
    "least-attained": LeastAttained,
}  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and choices of one engine. Raises UserError for those that contradict each other.

    Args:
      max_len: tokens of a prompt and its answer together; by default the model's most.
      page_size: tokens of a page.
      pages: how many there are; by default what `memory` holds or, without that, what half of
        max_len takes for every sequence that may run.
      memory: bytes for pages.
      max_running: sequences that run at once.
      max_waiting: answers that may wait; more are refused.
      budget: tokens that a step computes at most.
      steps: tokens a row in one call of the device, where nobody waits; by default the backend's.
      policy: who goes first.
      prefix_cache: keep what was computed for prompts that begin alike.
      kv_dtype: of the pages: the model's, a float's, or int8 or float8_e4m3fn with a scale a token
        and head.
      invariant: an answer's bits depend on nothing that runs beside it. Every step then has one
        shape: a lone token costs as much as `budget` of them.
      draft: tokens to guess at each turn; 0 guesses none.
      draft_model: who guesses: a smaller model by name, or first:N for the model's own first N
        layers; by default what was said before is looked up.
      tp: devices that share each step.
    """

    max_len: int | None = None
    page_size: int = 16
    pages: int | None = None
    memory: int | None = None
    max_running: int = 16
    max_waiting: int = 1024
    budget: int = 256
    steps: int | None = None
    policy: Literal["first-come", "priority", "shortest", "fair", "least-attained"] = "priority"
    prefix_cache: bool = True
    kv_dtype: str | None = None
    invariant: bool = False
    draft: int = 0
    draft_model: str | None = None
    tp: int = 1

    def __post_init__(self) -> None:
        for name in ("page_size", "max_running", "max_waiting", "budget", "tp"):
            if getattr(self, name) < 1:
                raise UserError(f"engine: {name}={getattr(self, name)}; give 1 or more")
        for name in ("max_len", "pages", "memory", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"engine: {name}={value}; give 1 or more, or leave it out")
        if self.budget < self.max_running:
            raise UserError(
                f"engine: budget={self.budget} is below max_running={self.max_running}; a step "
                "must have a token for each that runs"
            )
        if self.policy not in POLICIES:
            raise UserError(f"engine: policy={self.policy!r}; choose one of {', '.join(POLICIES)}")
        if not 0 <= self.draft <= 15:
            raise UserError(f"engine: draft={self.draft}; give 0 to 15 tokens")
        if self.draft_model is not None and not self.draft:
            raise UserError("engine: a draft_model guesses draft=0 tokens; give draft=4 or so")
        if self.draft_layers is None and self.draft_model is not None and self.tp > 1:
            raise UserError("engine: a draft model is not cut; leave out tp, or give first:N")
        if self.invariant and self.draft:
            raise UserError("engine: drafting changes a step's shape; leave out draft or invariant")

    @property
    def draft_layers(self) -> int | None:
        """Of the model itself, if those guess."""
        kind, _, count = (self.draft_model or "").partition(":")
        if kind != "first":
            return None
        if not count.isdecimal():
            raise UserError(f"engine: draft_model={self.draft_model!r}; give first:N, N layers")
        return int(count)
