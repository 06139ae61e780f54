"""One int32 array a step: what the host tells the device, packed here and taken apart there.

A step that sent its dozen small arrays one by one would pay a transfer for each. Floats travel as
their bits. `Layout` is static: it names a compiled program.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax

INTEGERS = (
    "slot",  # where the device keeps what it remembers of the sequence
    "length",  # tokens of the sequence when its chunk is computed
    "left",  # tokens it may make in this call
    "top_k", "key_0", "key_1",
    "seeded",  # 1 where a draft stands only if it is what the seed draws
)  # fmt: skip
FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
ROW = np.dtype([*((n, np.int32) for n in INTEGERS), *((n, np.float32) for n in FLOATS)])
_WORDS = len(INTEGERS) + len(FLOATS)


@dataclass(frozen=True)
class Layout:
    """T tokens of B rows that may have M pages each, and S places where tokens are drawn.

    `steps` tokens a row are made in one call; more than one only where each row computes one.
    plain: no row wants penalties, truncation, a bias, a mask, likeliest tokens or prompt scores.
    drafts: tokens that a draft model guesses for each row before the step. With S = 0 the draft
    model reads the T tokens, and nothing else is computed.
    """

    T: int
    B: int
    M: int
    S: int
    steps: int = 1
    plain: bool = False
    drafts: int = 0

    @property
    def reads(self) -> bool:
        """Whether the draft model alone computes."""
        return self.S == 0

    @property
    def everywhere(self) -> bool:
        """Whether place i is token i, and not the last token of row i."""
        return self.S > self.B

    @cached_property
    def _parts(self) -> dict[str, tuple[int, int]]:
        sizes = {
            "switches": 4, "tokens": self.T, "after": self.T, "starts": self.B + 1,
            "before": self.B if self.drafts else 0, "sample": self.S, "rows": self.B * _WORDS,
            "table": self.B * self.M,
        }  # fmt: skip
        ends = itertools.accumulate(sizes.values())
        return {
            name: (end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)
        }

    @property
    def size(self) -> int:
        """Numbers of the packed array."""
        return self._parts["table"][1]

    def empty(self) -> tuple[np.ndarray, dict[str, Any]]:
        """A packed array [size] of a step without rows, and views into it by name.

        tokens [T]: below zero, -1 - slot takes the last token that the device made there.
        after [T]: the prompt's token after each, where it is to be scored.
        starts [B + 1]: where each row's tokens begin.
        before [B]: the token before each row's first, where a draft model guesses.
        sample [S]: where among the tokens one is drawn, -1 for none.
        switches [4]: 1 where any row wants penalties, truncation, likeliest tokens, prompt scores.
        """
        packed = np.zeros(self.size, np.int32)
        views: dict[str, Any] = {name: packed[a:b] for name, (a, b) in self._parts.items()}
        views["rows"] = views["rows"].view(ROW)
        views["sample"][:] = -1
        views["table"] = views["table"].reshape(self.B, self.M)
        return packed, views

    def unpack(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The same by name on the device: `starts`, `sample`, ..., and each field of a row [B]."""
        import jax.numpy as jnp
        from jax import lax

        out = {name: packed[a:b] for name, (a, b) in self._parts.items()}
        rows = out.pop("rows").reshape(self.B, _WORDS)
        for i, name in enumerate(INTEGERS + FLOATS):
            bits = rows[:, i]
            floats = i >= len(INTEGERS)
            out[name] = lax.bitcast_convert_type(bits, jnp.float32) if floats else bits
        out["table"] = out["table"].reshape(self.B, self.M)
        return out
