"""What a system of rollout workers and a trainer is told."""

from __future__ import annotations

import dataclasses

from align.buffer import Order
from align.config import RLConfig
from jaxinfra.errors import UserError


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """How far those who draw answers may run ahead of the one who learns from them.

    max_staleness 0 is the synchronous loop, 1 is one step off-policy, more is asynchronous: one
    code. A batch is `RLConfig.prompts` groups.
    """

    max_staleness: int = 0
    """Steps that the policy may have made since an answer was begun; older answers are dropped."""
    workers: int = 1
    """Threads that draw answers."""
    chunk: int = 0
    """Tokens between two looks at new weights (in-flight updates); 0: one policy an answer."""
    order: Order = "fifo"
    """Of experience; with replay and prioritised it is used until it is too old."""
    capacity: int = 2**22
    """Tokens that wait for an update, at most."""
    memory: int = 2**20
    """Tokens of them in memory, where there is a folder for the rest."""
    straggler: float = 600.0
    """Seconds after which a batch is begun anew by another worker; the first to end counts."""
    failures: int = 3
    """Times that one batch may fail in a row before the run ends."""

    def __post_init__(self) -> None:
        for name, least in (("max_staleness", 0), ("workers", 1), ("chunk", 0), ("failures", 1)):
            if getattr(self, name) < least:
                raise UserError(f"system: {name}={getattr(self, name)}: give {least} or more")
        if not self.straggler > 0:
            raise UserError(f"system: straggler={self.straggler}: give seconds")

    def check(self, config: RLConfig) -> None:
        """Raises UserError where the algorithm would take old answers for its own."""
        if (self.max_staleness or self.chunk) and config.importance is None:
            raise UserError(
                "system: answers of older policies need importance=sequence_truncate (or another "
                "correction): give one, or max_staleness=0 and chunk=0"
            )
